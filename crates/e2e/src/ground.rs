//! Where the tests run, and the servers that they start there.
//!
//! Writes: a directory for each server, below the one that `cargo xtask test` names.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use kelvin_powercut::Block;

use crate::links::ip;
use crate::server::{Server, make_xfs, mount_loop};

/// Where the tests run.
pub struct Ground {
    pub(crate) binary: PathBuf,
    pub(crate) directory: PathBuf,
    pub(crate) found: Instant,
}

/// Says how long the test took: the test program itself does not.
impl Drop for Ground {
    fn drop(&mut self) {
        let thread = std::thread::current();
        println!("{} took {:.1} s", thread.name().unwrap_or("a test"), self.found.elapsed().as_secs_f64());
    }
}

/// Has every panic of a test appended to `path` too: `cargo xtask test` ends with them, whatever was printed since.
fn write_down_panics(path: PathBuf) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let name = std::thread::current().name().unwrap_or("?").to_owned();
            if let Ok(mut file) = fs::File::options().create(true).append(true).open(&path) {
                let _ = std::io::Write::write_all(&mut file, format!("{name}: {panic}\n").as_bytes());
            }
            usual(panic);
        }));
    });
}

impl Ground {
    /// The ground that `cargo xtask test` made, or a line that says why there is none.
    pub fn find() -> Option<Self> {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        match (variable("KELVIN_E2E_BINARY"), variable("KELVIN_E2E_DIR")) {
            (Some(binary), Some(directory)) => {
                write_down_panics(directory.join("failures"));
                // Slots, sockets and packets of a test stay in a namespace that ends with its thread. Runtimes of
                // tests have no other thread that would open a socket.
                if rustix::process::geteuid().is_root() {
                    kelvin_host::net::ns::unshare().expect("a network namespace");
                    ip("link set lo up");
                }
                Some(Self { binary, directory, found: Instant::now() })
            }
            _ => {
                println!("skipped: no ground for end-to-end tests, `cargo xtask test` makes it");
                None
            }
        }
    }

    /// The same where sandboxes can have networks, or a line that says why they cannot.
    pub async fn with_networks() -> Option<Self> {
        let ground = Self::find()?;
        match kelvin_host::net::check().await {
            Ok(()) => Some(ground),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    /// Starts a server called `name` with template `base` (256 MiB) imported; [`Ground::baked`] one that is baked, too.
    pub async fn server(&self, name: &str, args: &[&str]) -> Server {
        self.server_as(None, name, args).await
    }

    /// The same as another user, without rights.
    pub async fn server_as(&self, user: Option<u32>, name: &str, args: &[&str]) -> Server {
        let data_dir = self.directory.join(name);
        fs::create_dir(&data_dir).expect("a fresh data directory");
        self.server_in(user, data_dir, None, args).await
    }

    /// The same on a file system of its own, `size_mib` large.
    pub async fn server_on(&self, size_mib: u32, name: &str, args: &[&str]) -> Server {
        let data_dir = self.directory.join(name);
        fs::create_dir(&data_dir).expect("a fresh data directory");
        let image = self.directory.join(format!("{name}.xfs"));
        fs::File::create(&image).and_then(|file| file.set_len(u64::from(size_mib) << 20)).expect("an image");
        make_xfs(&image);
        mount_loop(&image, &data_dir);
        self.server_in(None, data_dir, Some(image), args).await
    }

    /// The same on a disk, `size_mib` large, whose power can fail; or a line that says why there is no such disk.
    pub async fn server_on_block(&self, size_mib: u32, name: &str, args: &[&str]) -> Option<Server> {
        let (data_dir, device) = (self.directory.join(name), self.directory.join(format!("{name}.device")));
        fs::create_dir(&device).expect("a fresh directory");
        // Of a test that was killed.
        let _ = fs::remove_file(data_dir.with_extension("survives"));
        let bytes = u64::from(size_mib) << 20;
        let Some(block) = Block::mount(&device, bytes).expect("a device") else {
            fs::remove_dir(&device).expect("it is empty");
            println!("skipped: no /dev/fuse");
            return None;
        };
        fs::create_dir(&data_dir).expect("a fresh data directory");
        let image = block.image();
        make_xfs(&image);
        mount_loop(&image, &data_dir);
        let mut server = self.prepared(None, data_dir, None);
        server.block = Some((block, bytes));
        server.begin(args).await;
        Some(server)
    }

    pub(crate) async fn server_in(
        &self,
        user: Option<u32>,
        data_dir: PathBuf,
        image: Option<PathBuf>,
        args: &[&str],
    ) -> Server {
        if user.is_some() {
            std::os::unix::fs::chown(&data_dir, user, user).expect("it can be given away");
        }
        let mut server = self.prepared(user, data_dir, image);
        server.begin(args).await;
        server
    }

    pub(crate) fn prepared(&self, user: Option<u32>, data_dir: PathBuf, image: Option<PathBuf>) -> Server {
        Server {
            binary: self.binary.clone(),
            user,
            data_dir,
            image,
            block: None,
            guest: self.directory.join("guest"),
            process: None,
            url: String::new(),
            stopped: false,
            descriptors: None,
            umask: None,
        }
    }

    /// The guest's files.
    pub fn guest(&self, name: &str) -> PathBuf {
        self.directory.join("guest").join(name)
    }
}
