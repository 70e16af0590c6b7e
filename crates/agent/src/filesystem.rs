//! `filesystem.Filesystem`: what is there, and what happens to it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures::{StreamExt, stream};
use kelvin_api::envd::filesystem::__buffa::oneof::watch_dir_response::Event as Told;
use kelvin_api::envd::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EntryInfo, FileType, Filesystem, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest,
    MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest, RemoveWatcherResponse, StatRequest,
    StatResponse, WatchDirRequest, WatchDirResponse,
};

use crate::entries::{clean, entry, failed, make_dirs};
use crate::fault::{blocking, typed};
use crate::process::keepalive;
use crate::state::State;
use crate::users::User;
use crate::watch::{Wanted, Watch, Watches};

/// Entries of one `ListDir`; more are refused instead of filling memory.
const MAX_ENTRIES: usize = 100_000;

/// The service.
pub struct Files {
    state: Arc<State>,
    watches: Watches,
}

/// Does `work` where it may wait for a file system; an error is one of `path`.
async fn at<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce(&Path) -> Result<T, ConnectError> + Send + 'static,
) -> Result<T, ConnectError> {
    let own = path.to_owned();
    blocking(move || Ok(work(&own))).await.unwrap_or_else(|error| Err(failed(path, &error)))
}

fn list(path: &Path, depth: u32, entries: &mut Vec<EntryInfo>) -> Result<(), ConnectError> {
    let mut names: Vec<_> = std::fs::read_dir(path)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(|error| failed(path, &error))?
        .into_iter()
        .map(|found| found.path())
        .collect();
    names.sort();
    for name in names {
        // Gone between the two calls: then it is not listed.
        let Ok(found) = entry(&name) else { continue };
        if entries.len() >= MAX_ENTRIES {
            return Err(ConnectError::resource_exhausted(format!("more than {MAX_ENTRIES} entries")));
        }
        let descend =
            depth > 1 && !found.is_symlink && found.r#type.to_i32() == FileType::FILE_TYPE_DIRECTORY as i32;
        entries.push(found);
        if descend {
            list(&name, depth - 1, entries)?;
        }
    }
    Ok(())
}

impl Files {
    pub fn new(state: Arc<State>) -> Self {
        Self { state, watches: Watches::default() }
    }

    fn path(&self, ctx: &RequestContext, path: &str) -> Result<(User, PathBuf), ConnectError> {
        let user = self.state.user_of(ctx.headers())?;
        if path.contains('\0') {
            return Err(ConnectError::invalid_argument("the path has a NUL byte"));
        }
        let path = clean(&user.resolve(path));
        Ok((user, path))
    }
}

#[allow(refining_impl_trait)] // a service names its reply types
impl Filesystem for Files {
    async fn stat(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<StatResponse> {
        let (_, path) = self.path(&ctx, request.path)?;
        let mut entry = at(&path, |path| entry(path).map_err(|error| failed(path, &error))).await?;
        // A Stat follows the link. Source: envd; clients show what has the flag as a link.
        entry.is_symlink = false;
        Response::ok(StatResponse { entry: entry.into(), ..Default::default() })
    }

    async fn list_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<ListDirResponse> {
        let (_, path) = self.path(&ctx, request.path)?;
        let depth = request.depth.max(1);
        let entries = at(&path, move |path| {
            let found = std::fs::metadata(path).map_err(|error| failed(path, &error))?;
            if !found.is_dir() {
                return Err(failed(path, &io::ErrorKind::NotADirectory.into()));
            }
            let mut entries = Vec::new();
            list(path, depth, &mut entries)?;
            Ok(entries)
        })
        .await?;
        Response::ok(ListDirResponse { entries, ..Default::default() })
    }

    async fn make_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<MakeDirResponse> {
        let (user, path) = self.path(&ctx, request.path)?;
        let entry = at(&path, move |path| {
            match std::fs::metadata(path) {
                Ok(found) if found.is_dir() => {
                    return Err(failed(path, &io::ErrorKind::AlreadyExists.into()));
                }
                // As envd says it.
                Ok(_) => {
                    let text = format!("path '{}' exists already but it is not a directory", path.display());
                    return Err(ConnectError::invalid_argument(text));
                }
                Err(_) => {}
            }
            make_dirs(path, &user).and_then(|()| entry(path)).map_err(|error| failed(path, &error))
        })
        .await?;
        Response::ok(MakeDirResponse { entry: entry.into(), ..Default::default() })
    }

    async fn r#move(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<MoveResponse> {
        let (user, source) = self.path(&ctx, request.source)?;
        let (_, destination) = self.path(&ctx, request.destination)?;
        let entry = at(&source, move |source| {
            // What is missing is told of the source, and no folder is made for it.
            std::fs::symlink_metadata(source).map_err(|error| failed(source, &error))?;
            if let Some(parent) = destination.parent() {
                make_dirs(parent, &user).map_err(|error| failed(parent, &error))?;
            }
            std::fs::rename(source, &destination).map_err(|error| match error.kind() {
                io::ErrorKind::CrossesDevices => {
                    let (source, destination) = (source.display(), destination.display());
                    let text = format!("'{source}' and '{destination}' are on different file systems: copy it, then remove it");
                    typed(&error, text)
                }
                io::ErrorKind::NotFound => failed(source, &error),
                _ => failed(&destination, &error),
            })?;
            entry(&destination).map_err(|error| failed(&destination, &error))
        })
        .await?;
        Response::ok(MoveResponse { entry: entry.into(), ..Default::default() })
    }

    async fn remove(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<RemoveResponse> {
        let (_, path) = self.path(&ctx, request.path)?;
        at(&path, |path| {
            let removed = match std::fs::symlink_metadata(path) {
                Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
                Ok(_) => std::fs::remove_file(path),
                Err(error) => Err(error),
            };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path, &error)),
                _ => Ok(()),
            }
        })
        .await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        let (_, root) = self.path(&ctx, request.path)?;
        let allowed = request.allow_network_mounts;
        at(&root, move |root| local(root, allowed)).await?;
        let (recursive, include_entry) = (request.recursive, request.include_entry);
        let watch = self.watches.open(Wanted { root, recursive, include_entry })?;
        let start = WatchDirResponse { event: Some(Told::Start(Box::default())), ..Default::default() };
        Response::stream_ok(stream::iter([Ok(start)]).chain(told(watch, keepalive(&ctx))))
    }

    async fn create_watcher(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<CreateWatcherResponse> {
        let (_, root) = self.path(&ctx, request.path)?;
        let allowed = request.allow_network_mounts;
        at(&root, move |root| local(root, allowed)).await?;
        let (recursive, include_entry) = (request.recursive, request.include_entry);
        let watcher_id = self.watches.create(Wanted { root, recursive, include_entry })?;
        Response::ok(CreateWatcherResponse { watcher_id, ..Default::default() })
    }

    async fn get_watcher_events(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<GetWatcherEventsResponse> {
        let events = self.watches.fetch(request.watcher_id)?;
        Response::ok(GetWatcherEventsResponse { events, ..Default::default() })
    }

    async fn remove_watcher(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<RemoveWatcherResponse> {
        self.watches.remove(request.watcher_id)?;
        Response::ok(RemoveWatcherResponse::default())
    }
}

/// Refuses what is mounted over a network: what others change there makes no event here.
fn local(path: &Path, allowed: bool) -> Result<(), ConnectError> {
    /// NFS, CIFS, SMB2, FUSE, 9P, Ceph. Source: Linux, `include/uapi/linux/magic.h`.
    const REMOTE: [i64; 6] = [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546, 0x0102_1997, 0x00c3_6400];
    let found = rustix::fs::statfs(path).map_err(|error| failed(path, &error.into()))?;
    if !allowed && REMOTE.contains(&found.f_type) {
        let text = format!("path '{}' is on a network mount", path.display());
        return Err(ConnectError::invalid_argument(text));
    }
    Ok(())
}

/// What one client is told of `watch`, with keepalives in between.
fn told(
    watch: Watch,
    keepalive: Option<Duration>,
) -> impl futures::Stream<Item = Result<WatchDirResponse, ConnectError>> + Send {
    let events = stream::unfold(Some(watch), move |watch| async move {
        let mut watch = watch?;
        let next = match keepalive {
            Some(interval) => tokio::time::timeout(interval, watch.next()).await,
            None => Ok(watch.next().await),
        };
        Some(match next {
            Ok(Ok(events)) => {
                let tell = |event| Told::Filesystem(Box::new(event));
                (events.into_iter().map(tell).map(Ok).collect::<Vec<_>>(), Some(watch))
            }
            Ok(Err(error)) => (vec![Err(error)], None),
            Err(_elapsed) => (vec![Ok(Told::Keepalive(Box::default()))], Some(watch)),
        })
    });
    events
        .flat_map(stream::iter)
        .map(|told| told.map(|event| WatchDirResponse { event: Some(event), ..Default::default() }))
}
