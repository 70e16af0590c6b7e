//! What containers, buckets and VPNs inside of a guest stand on: scripts that root runs there.

/// What Docker, buckets and VPNs stand on, of whichever kernel the guest has: built in, or loaded when it is asked for. A
/// directory of its own for each.
pub const CONTAINERS: [(&str, &str); 11] = [
    (
        "overlayfs",
        "mkdir l u w m; echo below > l/f; mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m; \
         echo above > m/f; test $(cat l/f u/f | tr -d '\\n') = belowabove; umount m",
    ),
    // A directory of its own for a container: its memory and its processes are limited.
    (
        "control groups of version 2",
        "cd /sys/fs/cgroup; test $(stat -f -c %T .) = cgroup2fs; \
         for one in cpu cpuset io memory pids; do grep -qw $one cgroup.controllers; done; \
         echo '+cpu +memory +pids' > cgroup.subtree_control; mkdir ctr; echo 32M > ctr/memory.max; echo 64 > ctr/pids.max; echo '50000 100000' > ctr/cpu.max; \
         sh -c 'echo 0 > ctr/cgroup.procs; grep -q ctr /proc/self/cgroup'; echo 1 > ctr/cgroup.freeze; \
         grep -q 'frozen 1' ctr/cgroup.events; rmdir ctr",
    ),
    (
        "links",
        "ip link add br-t type bridge; ip link add v0 type veth peer name v1; ip link set v0 master br-t; \
         ip link del v0; ip link del br-t; ip link add d0 type dummy; ip link del d0",
    ),
    ("a namespace of networks", "unshare --net --mount --pid --fork --uts --ipc ip link set lo up"),
    (
        "a namespace of users",
        "setpriv --reuid 1000 --regid 1000 --clear-groups unshare --user --map-root-user id -u",
    ),
    (
        "tun",
        "python3 -c \"import fcntl, os, struct; f = os.open('/dev/net/tun', os.O_RDWR); \
         fcntl.ioctl(f, 0x400454ca, struct.pack('16sH14x', b'kelvin-t', 0x1001)); \
         assert 'kelvin-t' in open('/proc/net/dev').read()\"",
    ),
    // The kernel asks what serves a mount before anything else: FUSE_INIT is 26.
    (
        "FUSE",
        "mkdir m; python3 -c \"import ctypes, os, struct; f = os.open('/dev/fuse', os.O_RDWR); \
         c = ctypes.CDLL(None, use_errno=True); o = ('fd=%d,rootmode=40000,user_id=0,group_id=0' % f).encode(); \
         assert c.mount(b'kelvin', b'm', b'fuse', 0, o) == 0, ctypes.get_errno(); \
         assert struct.unpack('II', os.read(f, 65536)[:8])[1] == 26; c.umount2(b'm', 2)\"",
    ),
    ("loop devices", "truncate -s 1M f; device=$(losetup -f --show f); losetup -d $device"),
    ("file systems", "modprobe -a squashfs isofs vfat; grep -qw squashfs /proc/filesystems"),
    ("nftables, and iptables in front of them", NFTABLES),
    (
        "what iptables asks for",
        "modprobe -a nft_compat xt_addrtype xt_conntrack xt_MASQUERADE nft_chain_nat br_netfilter",
    ),
];

/// What `nft -f` and `iptables-nft` send, since the image has neither: a table of the family inet with a chain that translates
/// addresses and a rule that masquerades; then Docker's rule, with a match and a target of iptables. Each in one transaction, which
/// the kernel accepts whole. Source: Linux, include/uapi/linux/netfilter/nf_tables.h, nf_tables_compat.h, xt_addrtype.h.
const NFTABLES: &str = r#"python3 -c "
import socket, struct
def attr(kind, data):
    size = 4 + len(data)
    return struct.pack('HH', size, kind) + data + bytes(-size % 4)
def text(kind, value): return attr(kind, value.encode() + bytes(1))
def nested(kind, *inner): return attr(kind | 0x8000, b''.join(inner))
def message(kind, flags, family, *inner):
    body = struct.pack('>BBH', family, 0, 10 if kind in (16, 17) else 0) + b''.join(inner)
    message.number += 1
    return struct.pack('IHHII', 16 + len(body), kind, flags, message.number, 0) + body
message.number = 0
new = 0x405
def nft(kind): return 10 << 8 | kind
def be(number): return struct.pack('>I', number)
hook = nested(4, attr(1, be(4)), attr(2, be(100)))
def chain(family, table, name, *rule): return (message(16, 1, 0)
    + message(nft(0), new, family, text(1, table))
    + message(nft(3), new, family, text(1, table), text(3, name), hook, text(7, 'nat'))
    + message(nft(6), new | 0x800, family, text(1, table), text(2, name), nested(4, *rule))
    + message(17, 1, 0))
def of_iptables(kind, name, revision, info):
    return nested(1, text(1, kind), nested(2, text(1, name), attr(2, be(revision)), attr(3, info)))
inet = chain(1, 'kelvin', 'post', nested(1, text(1, 'masq'), nested(2)))
ipv4 = chain(2, 'nat', 'POSTROUTING',
    of_iptables('match', 'addrtype', 1, struct.pack('HHI', 0, 4, 0)),
    of_iptables('target', 'MASQUERADE', 0, struct.pack('IIIIHHI', 1, 0, 0, 0, 0, 0, 0)))
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
s.settimeout(20)
for first, batch in ((2, inet), (7, ipv4)):
  s.send(batch)
  left = {first, first + 1, first + 2}
  while left:
    data = s.recv(65536)
    while data:
        size, kind, flags, number, port = struct.unpack('IHHII', data[:16])
        code, = struct.unpack('i', data[16:20])
        assert kind == 2 and code == 0, (number, code)
        left.discard(number)
        data = data[size + 3 & ~3:]
""#;
