//! nftables through its own library: rule sets as text, each buffer one transaction of the kernel.
//!
//! `libnftables.so.1` is loaded when it is first needed, so that a host without it can still run sandboxes
//! that have no network. A context's netlink socket belongs to the network namespace of the calling thread.
//! Source: `libnftables(3)`.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::io;
use std::sync::OnceLock;

use libloading::Library;
use rustix::thread::{UnshareFlags, unshare_unsafe};

type New = unsafe extern "C" fn(c_uint) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void);
type Flag = unsafe extern "C" fn(*mut c_void) -> c_int;
type Run = unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int;
type Text = unsafe extern "C" fn(*mut c_void) -> *const c_char;
type Output = unsafe extern "C" fn(*mut c_void, c_uint);

/// `NFT_CTX_OUTPUT_JSON` of `nftables/libnftables.h`.
const JSON: c_uint = 1 << 4;

struct Functions {
    _library: Library,
    new: New,
    free: Free,
    buffer_output: Flag,
    buffer_error: Flag,
    run: Run,
    output: Text,
    error: Text,
    set_output: Output,
}

#[allow(unsafe_code)]
fn load() -> Result<Functions, String> {
    // SAFETY: the library's initialisers have no requirements; each symbol has the type that its header
    // gives it, and the library stays loaded as long as the pointers are kept.
    unsafe {
        let library = Library::new("libnftables.so.1").map_err(|error| error.to_string())?;
        macro_rules! symbol {
            ($name:literal, $kind:ty) => {
                *library.get::<$kind>($name).map_err(|error| error.to_string())?
            };
        }
        Ok(Functions {
            new: symbol!(b"nft_ctx_new", New),
            free: symbol!(b"nft_ctx_free", Free),
            buffer_output: symbol!(b"nft_ctx_buffer_output", Flag),
            buffer_error: symbol!(b"nft_ctx_buffer_error", Flag),
            run: symbol!(b"nft_run_cmd_from_buffer", Run),
            output: symbol!(b"nft_ctx_get_output_buffer", Text),
            error: symbol!(b"nft_ctx_get_error_buffer", Text),
            set_output: symbol!(b"nft_ctx_output_set_flags", Output),
            _library: library,
        })
    }
}

fn functions() -> io::Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    LOADED
        .get_or_init(load)
        .as_ref()
        .map_err(|error| io::Error::new(io::ErrorKind::Unsupported, error.clone()))
}

/// Runs `commands` as one transaction in the namespace of this thread and returns what they print, as JSON.
/// Blocks for some milliseconds.
///
/// The library waits with `select`, which ends the process at a descriptor above 1,023. So it runs on a thread
/// with a table of descriptors of its own, in which nothing but the standard streams is open.
///
/// # Errors
/// `Unsupported` without the library, otherwise what nftables said; then nothing was changed.
pub fn run(commands: &str) -> io::Result<String> {
    let functions = functions()?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("nftables".to_owned());
        let work = || {
            own_descriptors()?;
            transact(functions, commands)
        };
        let joined = thread.spawn_scoped(scope, work)?.join();
        joined.unwrap_or_else(|_| Err(io::Error::other("the thread of nftables panicked")))
    })
}

/// Gives this thread a table of descriptors of its own and closes what is in it.
#[allow(unsafe_code)]
fn own_descriptors() -> io::Result<()> {
    // SAFETY: the thread was started for what follows alone, which opens and closes only descriptors of its own;
    // those that are closed here stay open in the table of everybody else.
    unsafe {
        unshare_unsafe(UnshareFlags::FILES)?;
        if libc::close_range(3, libc::c_uint::MAX, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn transact(functions: &Functions, commands: &str) -> io::Result<String> {
    let text = CString::new(commands).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    // SAFETY: the context is made, used and freed on this thread; both buffers belong to it and are copied
    // before it is freed; `text` outlives the call.
    unsafe {
        let context = (functions.new)(0);
        if context.is_null() {
            return Err(io::Error::other("nftables cannot open a netlink socket"));
        }
        (functions.buffer_output)(context);
        (functions.buffer_error)(context);
        (functions.set_output)(context, JSON);
        let code = (functions.run)(context, text.as_ptr());
        let copy = |buffer: *const c_char| {
            if buffer.is_null() {
                String::new()
            } else {
                CStr::from_ptr(buffer).to_string_lossy().into_owned()
            }
        };
        let (output, error) = (copy((functions.output)(context)), copy((functions.error)(context)));
        (functions.free)(context);
        if code == 0 { Ok(output) } else { Err(io::Error::other(error.trim().to_owned())) }
    }
}

/// Whether the library can be used.
///
/// # Errors
/// `Unsupported` with the reason.
pub fn check() -> io::Result<()> {
    functions().map(drop)
}
