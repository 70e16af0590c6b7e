//! Registries that behave badly: a resume, another source, or a typed error.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use kelvin_api::error::ErrorCode;
use kelvin_api::id::Token;
use kelvin_image::{Credentials, Error, Limits, Mirror, Options, Reach, Refusal, Source};

use crate::fixture::{Ext4, Image, Layer, MANIFEST, Place, Tar, digest, noise};
use crate::server::{Asked, End, Reply, Server, good};

fn image() -> Arc<Image> {
    let noise = noise(300_000);
    Arc::new(Image::new(vec![Layer::gzip(&Tar::default().file("noise", &noise).end())]))
}

fn quick() -> Limits {
    Limits {
        backoff: Duration::from_millis(10),
        idle: Duration::from_millis(300),
        retry_after: Duration::from_secs(2),
        ..Limits::default()
    }
}

fn place() -> Place {
    Place::limited(quick())
}

fn source(reference: impl Into<String>) -> Source {
    Source::Registry { reference: reference.into(), credentials: None, reach: Reach::Any }
}

fn with_password(reference: impl Into<String>, password: &str) -> Source {
    let password = Token::from_secret(password.to_owned());
    let credentials = Some(Credentials { username: "me".to_owned(), password });
    Source::Registry { reference: reference.into(), credentials, reach: Reach::Any }
}

fn basic(password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("me:{password}")))
}

/// Answers as `first` for the first `times` requests of a path with `part`, and then well.
async fn failing(
    image: &Arc<Image>,
    part: &'static str,
    times: usize,
    first: impl Fn(&Image, &Asked) -> Reply + Send + Sync + 'static,
) -> Server {
    let image = Arc::clone(image);
    let count = AtomicUsize::new(0);
    Server::start(move |asked| {
        if asked.path.contains(part) && count.fetch_add(1, Ordering::SeqCst) < times {
            first(&image, asked)
        } else {
            good(&image, asked)
        }
    })
    .await
}

/// The path of the layer's blob ends so.
fn layer_of(image: &Image) -> &'static str {
    Box::leak(image.layers[0].digest.clone().into_boxed_str())
}

async fn pulls(server: &Server, image: &Image) -> Place {
    let place = place();
    let (found, _) = place.make_of(&source(server.reference("a/b")), "x.ext4").await.unwrap();
    assert_eq!(found.digest(), image.digest());
    assert_eq!(Ext4::open(&place.path("x.ext4")).read("/noise").len(), 300_000);
    place
}

async fn fails(server: &Server) -> Error {
    let place = place();
    let failed = place.make_of(&source(server.reference("a/b")), "x.ext4").await.unwrap_err();
    assert!(place.left().is_empty());
    failed
}

#[tokio::test]
async fn a_good_registry_is_asked_once_for_each_blob() {
    let image = image();
    let server = failing(&image, "nothing", 0, good).await;
    let place = pulls(&server, &image).await;
    // What is cached is not asked for again, the manifest is.
    place.make_of(&source(server.reference("a/b")), "y.ext4").await.unwrap();
    assert_eq!((server.times("/blobs/"), server.times("/manifests/latest")), (2, 2));
    // Side by side: one flight.
    let fresh = self::place();
    let reference = source(server.reference("a/b"));
    let both = tokio::join!(fresh.make_of(&reference, "1.ext4"), fresh.make_of(&reference, "2.ext4"));
    assert!(both.0.is_ok() && both.1.is_ok());
    assert_eq!(server.times("/blobs/"), 4);
}

#[tokio::test]
async fn an_index_leads_to_our_platform_by_digest() {
    let image = image();
    let entry = |digest: &str, size: usize, architecture: &str| {
        format!(
            r#"{{"mediaType":"{MANIFEST}","digest":"{digest}","size":{size},"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#
        )
    };
    let list = "application/vnd.docker.distribution.manifest.list.v2+json";
    let arm = entry(&digest(b"arm"), 3, "arm64");
    let ours = |size| format!("{arm},{}", entry(&image.digest(), size, "amd64"));
    let served = async |entries: String| {
        failing(&image, "/manifests/latest", usize::MAX, move |_, _| {
            Reply::new(200, format!(r#"{{"manifests":[{entries}]}}"#)).with("content-type", list)
        })
        .await
    };
    let server = served(ours(image.manifest.len())).await;
    pulls(&server, &image).await;
    assert_eq!((server.times(&image.digest()), server.times("arm")), (1, 0));
    let server = served(ours(image.manifest.len() + 1)).await;
    assert!(matches!(fails(&server).await, Error::Refused { why: Refusal::Size { .. }, .. }));
    let failed = fails(&served(arm.clone()).await).await;
    assert!(matches!(&failed, Error::Refused { why: Refusal::Platform(_), .. }), "{failed}");
    assert!(failed.remediation().contains("linux/amd64"));
}

#[tokio::test]
async fn a_blob_goes_on_where_it_stopped() {
    let image = image();
    let layer = layer_of(&image);
    for end in [End::Reset(100_000), End::Stall(100_000)] {
        let server = failing(&image, layer, 1, move |image, asked| good(image, asked).ending(end)).await;
        pulls(&server, &image).await;
        let ranges: Vec<_> = server
            .asked()
            .iter()
            .filter(|asked| asked.path.ends_with(layer))
            .map(|asked| asked.header("range").map(str::to_owned))
            .collect();
        assert_eq!(ranges, [None, Some("bytes=100000-".to_owned())], "{end:?}");
    }
}

#[tokio::test]
async fn a_blob_goes_on_in_a_later_pull() {
    let image = image();
    let layer = layer_of(&image);
    let server =
        failing(&image, layer, 5, |image, asked| good(image, asked).ending(End::Reset(10_000))).await;
    let place = place();
    let reference = source(server.reference("a/b"));
    let failed = place.make_of(&reference, "x.ext4").await.unwrap_err();
    assert_eq!(failed.code(), ErrorCode::RegistryUnavailable);
    place.make_of(&reference, "x.ext4").await.unwrap();
    let last = server.asked().into_iter().rfind(|asked| asked.path.ends_with(layer)).unwrap();
    assert_eq!(last.header("range"), Some("bytes=50000-"));
    assert_eq!(server.times(layer), 6);
}

#[tokio::test]
async fn a_server_without_ranges_begins_anew() {
    let image = image();
    let layer = layer_of(&image);
    let whole = Arc::clone(&image);
    let count = AtomicUsize::new(0);
    let server = Server::start(move |asked| {
        let reply = good(&whole, asked);
        if !asked.path.ends_with(&whole.layers[0].digest) {
            return reply;
        }
        match count.fetch_add(1, Ordering::SeqCst) {
            0 => reply.ending(End::Reset(50_000)),
            _ => Reply::new(200, whole.layers[0].blob.clone()),
        }
    })
    .await;
    pulls(&server, &image).await;
    assert_eq!(server.times(layer), 2);
}

#[tokio::test]
async fn what_passes_is_tried_again_and_what_does_not_is_unavailable() {
    let image = image();
    for part in ["/manifests/", layer_of(&image)] {
        for status in [429, 500, 502, 503] {
            let server = failing(&image, part, 2, move |_, _| Reply::new(status, "later")).await;
            pulls(&server, &image).await;
            assert_eq!(server.times(part), 3, "{status}");
        }
        let server = failing(&image, part, usize::MAX, |_, _| Reply::new(503, "")).await;
        let failed = fails(&server).await;
        assert!(matches!(&failed, Error::Unavailable { reason, .. } if reason.contains("503")), "{failed}");
        assert_eq!(server.times(part), 5);
        // A stall, at every try.
        let server =
            failing(&image, part, usize::MAX, |image, asked| good(image, asked).ending(End::Stall(0))).await;
        let failed = fails(&server).await;
        assert!(
            matches!(&failed, Error::Unavailable { reason, .. } if reason.contains("stalls")),
            "{failed}"
        );
    }
}

#[tokio::test]
async fn a_registry_says_how_long_to_wait_within_bounds() {
    let image = image();
    let server = failing(&image, "/manifests/", 1, |_, _| Reply::new(429, "").with("retry-after", "1")).await;
    let begun = Instant::now();
    pulls(&server, &image).await;
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let server =
        failing(&image, "/manifests/", 1, |_, _| Reply::new(429, "").with("retry-after", "86400")).await;
    let begun = Instant::now();
    pulls(&server, &image).await;
    assert!(begun.elapsed() >= Duration::from_secs(2) && begun.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn statuses_have_their_codes() {
    let image = image();
    for (part, status, code) in [
        ("/manifests/", 404, ErrorCode::ImageNotFound),
        ("/manifests/", 403, ErrorCode::RegistryDenied),
        ("/manifests/", 401, ErrorCode::RegistryDenied),
        ("/manifests/", 400, ErrorCode::RegistryUnavailable),
        ("/manifests/", 302, ErrorCode::RegistryUnavailable),
        (layer_of(&image), 404, ErrorCode::ImageNotFound),
        (layer_of(&image), 403, ErrorCode::RegistryDenied),
    ] {
        let server = failing(&image, part, usize::MAX, move |_, _| Reply::new(status, "")).await;
        let failed = fails(&server).await;
        assert_eq!(failed.code(), code, "{status}: {failed}");
        assert_eq!(server.times(part), 1, "{status}");
        assert!(!failed.remediation().is_empty());
    }
    let port = Server::start(|_| Reply::new(200, "")).await.address;
    let failed = place().images.resolve(&source(format!("{port}/a")), &|_| ()).await.unwrap_err();
    assert!(matches!(failed, Error::Unavailable { .. } | Error::Refused { .. }), "{failed}");
}

#[tokio::test]
async fn a_token_is_asked_for_once_with_the_credentials_of_the_request() {
    let image = image();
    let address = Arc::new(std::sync::OnceLock::new());
    let (own, whole) = (Arc::clone(&address), Arc::clone(&image));
    let server = Server::start(move |asked| {
        if asked.path.starts_with("/token?") {
            return match asked.header("authorization") {
                Some(header) if header == basic("sesame") => Reply::new(200, r#"{"token":"t0k3n"}"#),
                _ => Reply::new(401, ""),
            };
        }
        if asked.header("authorization") == Some("Bearer t0k3n") {
            return good(&whole, asked);
        }
        let address: &std::net::SocketAddr = own.get().unwrap();
        let challenge =
            format!(r#"Bearer realm="http://{address}/token",service="here",scope="repository:a/b:pull""#);
        Reply::new(401, "").with("www-authenticate", challenge)
    })
    .await;
    address.set(server.address).unwrap();
    let place = place();
    let (found, _) =
        place.make_of(&with_password(server.reference("a/b"), "sesame"), "x.ext4").await.unwrap();
    assert_eq!(server.times("/token?service=here&scope=repository%3Aa%2Fb%3Apull"), 1);
    assert!(!format!("{found:?}").contains("sesame") && !format!("{found:?}").contains("t0k3n"));
    // Wrong ones, and none.
    for wrong in [with_password(server.reference("a/b"), "open"), source(server.reference("a/b"))] {
        let failed = place.make_of(&wrong, "y.ext4").await.unwrap_err();
        assert_eq!(failed.code(), ErrorCode::RegistryDenied);
        assert!(!failed.to_string().contains("open"));
    }
    // From Docker's configuration.
    let config = place.path("config.json");
    let auth = basic("sesame").split_off(6);
    std::fs::write(&config, format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, server.address)).unwrap();
    let configured =
        Place::with(Options { docker_config: Some(config), limits: quick(), ..Options::default() });
    configured.make_of(&source(server.reference("a/b")), "x.ext4").await.unwrap();
    let failed = configured.make_of(&with_password(server.reference("a/b"), "open"), "y.ext4").await;
    assert!(matches!(failed, Err(Error::Denied { .. })), "those of the request win");
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let image = image();
    let address = Arc::new(std::sync::OnceLock::new());
    let (own, whole) = (Arc::clone(&address), Arc::clone(&image));
    let server = Server::start(move |asked| {
        if asked.path == "/token" {
            let is_right = asked.method == "POST"
                && asked.body.contains("grant_type=refresh_token&")
                && asked.body.ends_with("&refresh_token=sesame%2F1");
            return Reply::new(if is_right { 200 } else { 401 }, r#"{"access_token":"t0k3n"}"#);
        }
        if asked.header("authorization") == Some("Bearer t0k3n") {
            return good(&whole, asked);
        }
        let address: &std::net::SocketAddr = own.get().unwrap();
        Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"http://{address}/token\""))
    })
    .await;
    address.set(server.address).unwrap();
    let password = Token::from_secret("sesame/1".to_owned());
    let credentials = Some(Credentials { username: "<token>".to_owned(), password });
    let source = Source::Registry { reference: server.reference("a/b"), credentials, reach: Reach::Any };
    place().make_of(&source, "x.ext4").await.unwrap();
}

#[tokio::test]
async fn credentials_stay_with_their_host() {
    let image = image();
    let whole = Arc::clone(&image);
    // Another port is another host. It wants credentials, and gets none: neither sent on, nor by a challenge.
    let elsewhere = Server::start(move |asked| match asked.path.as_str() {
        "/hungry" => Reply::new(401, "").with("www-authenticate", "Basic realm=\"x\""),
        _ => Reply::new(200, whole.layers[0].blob.clone()),
    })
    .await;
    let (to, whole) = (elsewhere.address, Arc::clone(&image));
    let server = Server::start(move |asked| {
        if asked.header("authorization") != Some(&basic("sesame")) {
            return Reply::new(401, "").with("www-authenticate", "Basic realm=\"x\"");
        }
        match asked.path.contains(&whole.layers[0].digest) {
            true => Reply::new(307, "").with("location", format!("http://{to}/blob?signature=x")),
            false => good(&whole, asked),
        }
    })
    .await;
    let place = place();
    place.make_of(&with_password(server.reference("a/b"), "sesame"), "x.ext4").await.unwrap();
    assert!(server.asked().iter().any(|asked| asked.header("authorization").is_some()));
    let asked = elsewhere.asked();
    assert_eq!((asked.len(), asked[0].header("authorization")), (1, None));
    let hungry = Server::start(move |asked| {
        let _ = asked;
        Reply::new(307, "").with("location", format!("http://{to}/hungry"))
    })
    .await;
    let failed =
        place.make_of(&with_password(hungry.reference("a/b"), "sesame"), "y.ext4").await.unwrap_err();
    assert_eq!(failed.code(), ErrorCode::RegistryDenied);
    assert!(elsewhere.asked().iter().all(|asked| asked.header("authorization").is_none()));
    // Out of this machine without TLS: not followed. The address is of no host (RFC 5737).
    let leaving = Server::start(|_| Reply::new(302, "").with("location", "http://192.0.2.1/blob")).await;
    assert!(matches!(fails(&leaving).await, Error::Unavailable { .. }));
    // Tokens from there: not asked for.
    let realm = "Bearer realm=\"http://192.0.2.1/token\"";
    let leaving = Server::start(move |_| Reply::new(401, "").with("www-authenticate", realm)).await;
    assert!(matches!(fails(&leaving).await, Error::Denied { reason, .. } if reason.contains("HTTPS")));
    let circle = Server::start(|asked| Reply::new(302, "").with("location", asked.path.clone())).await;
    assert!(matches!(fails(&circle).await, Error::Unavailable { .. }));
}

#[tokio::test]
async fn a_tag_that_moves_changes_nothing() {
    let image = image();
    let other = Arc::new(Image::new(vec![Layer::plain(Tar::default().file("other", b"x").end())]));
    let moved = Arc::new(AtomicUsize::new(0));
    let (first, second, flag) = (Arc::clone(&image), Arc::clone(&other), Arc::clone(&moved));
    let server = Server::start(move |asked| {
        let now = if flag.load(Ordering::SeqCst) == 0 { &first } else { &second };
        // Blobs are there by digest, whatever the tag means.
        let reply = good(now, asked);
        if reply.status == 404 { good(&first, asked) } else { reply }
    })
    .await;
    let place = place();
    let found = place.images.resolve(&source(server.reference("a/b")), &|_| ()).await.unwrap();
    moved.store(1, Ordering::SeqCst);
    place.images.make(&found, &place.path("x.ext4"), None, &|_| ()).await.unwrap();
    assert!(Ext4::open(&place.path("x.ext4")).has("/noise"));
    let later = place.images.resolve(&source(server.reference("a/b")), &|_| ()).await.unwrap();
    assert_eq!(later.digest(), other.digest());
    assert_ne!(later.key(), found.key());
    // By its digest the first is still what it was.
    let pinned = server.reference(&format!("a/b@{}", image.digest()));
    assert_eq!(place.images.resolve(&source(pinned), &|_| ()).await.unwrap().key(), found.key());
}

#[tokio::test]
async fn content_that_is_another_is_refused_and_not_kept() {
    let image = image();
    let flip = |mut reply: Reply| {
        reply.body[7] ^= 1;
        reply
    };
    let config: &str = Box::leak(digest(image.config.as_bytes()).into_boxed_str());
    for part in [layer_of(&image), config] {
        let server = failing(&image, part, usize::MAX, move |image, asked| flip(good(image, asked))).await;
        let failed = fails(&server).await;
        assert!(matches!(&failed, Error::Refused { why: Refusal::Digest { .. }, .. }), "{failed}");
    }
    // Once, and then well: nothing of the first is used.
    let server = failing(&image, layer_of(&image), 1, move |image, asked| flip(good(image, asked))).await;
    let place = place();
    let reference = source(server.reference("a/b"));
    assert!(place.make_of(&reference, "x.ext4").await.is_err());
    place.make_of(&reference, "x.ext4").await.unwrap();
    // Longer and shorter than the manifest says, with a length and without.
    for (more, has_length) in [(true, true), (false, true), (true, false)] {
        let server = failing(&image, layer_of(&image), usize::MAX, move |image, asked| {
            let mut reply = good(image, asked);
            if more {
                reply.body.push(0)
            } else {
                reply.body.pop();
            }
            reply.has_length = has_length;
            reply
        })
        .await;
        assert!(matches!(fails(&server).await, Error::Refused { why: Refusal::Size { .. }, .. }));
    }
    // A manifest that is not what is asked for by digest, and one whose digest the registry itself denies.
    let server = failing(&image, "/manifests/", usize::MAX, |_, _| {
        Reply::new(200, "{}").with("content-type", MANIFEST)
    })
    .await;
    let pinned = source(server.reference(&format!("a@{}", image.digest())));
    let failed = place.images.resolve(&pinned, &|_| ()).await.unwrap_err();
    assert!(matches!(failed, Error::Refused { why: Refusal::Digest { .. }, .. }), "{failed}");
    let server = failing(&image, "/manifests/", usize::MAX, |image, asked| {
        good(image, asked).with("docker-content-digest", digest(b"another"))
    })
    .await;
    assert!(matches!(fails(&server).await, Error::Refused { why: Refusal::Digest { .. }, .. }));
    // 5 MiB of a manifest, said and not said.
    for has_length in [true, false] {
        let server = failing(&image, "/manifests/", usize::MAX, move |_, _| {
            let mut reply = Reply::new(200, vec![b' '; 5 << 20]).with("content-type", MANIFEST);
            reply.has_length = has_length;
            reply
        })
        .await;
        assert!(matches!(fails(&server).await, Error::Refused { why: Refusal::Limit { .. }, .. }));
    }
}

#[tokio::test]
async fn a_mirror_is_first_and_the_registry_behind_it() {
    let image = image();
    let registry = failing(&image, "nothing", 0, good).await;
    let good_mirror = failing(&image, "nothing", 0, good).await;
    let lies = failing(&image, "/blobs/", usize::MAX, |image, asked| {
        let mut reply = good(image, asked);
        reply.body[0] ^= 1;
        reply
    })
    .await;
    let broken = Server::start(|_| Reply::new(500, "")).await;
    let mirrored = |mirror: &Server| {
        let mirrors: Vec<Mirror> =
            vec![format!("{}=http://{}", registry.address, mirror.address).parse().unwrap()];
        Place::with(Options { mirrors, limits: quick(), ..Options::default() })
    };
    let reference = with_password(registry.reference("a/b"), "sesame");
    mirrored(&good_mirror).make_of(&reference, "x.ext4").await.unwrap();
    assert!(registry.asked().is_empty());
    for mirror in [&lies, &broken] {
        let place = mirrored(mirror);
        let (found, _) = place.make_of(&reference, "x.ext4").await.unwrap();
        assert_eq!(found.digest(), image.digest());
        assert!(!mirror.asked().is_empty());
    }
    assert!(registry.times("/blobs/") >= 2);
    // Credentials of the request are the registry's alone.
    for mirror in [&good_mirror, &lies, &broken] {
        assert!(mirror.asked().iter().all(|asked| asked.header("authorization").is_none()));
    }
}

/// The same source, for a tenant.
fn of_tenant(reference: impl Into<String>) -> Source {
    Source::Registry { reference: reference.into(), credentials: None, reach: Reach::Public }
}

#[tokio::test]
async fn a_tenant_reaches_no_address_of_this_machine() {
    let image = image();
    let server = failing(&image, "nothing", 0, good).await;
    let port = server.address.port();
    let place = place();
    // By address, by a name that resolves to one, and by addresses of private networks.
    for host in ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]"] {
        let began = Instant::now();
        let failed = place.images.resolve(&of_tenant(format!("{host}:{port}/a")), &|_| ()).await.unwrap_err();
        assert_eq!(failed.code(), ErrorCode::NotAnAdmin, "{host}: {failed}");
        // Not by what a connection comes to: nobody tries, and nobody tries again.
        assert!(began.elapsed() < quick().idle, "{host}");
    }
    assert!(server.asked().is_empty());
    // The operator does, and a connection that was kept for it is none of a tenant's.
    place.make_of(&source(server.reference("a/b")), "x.ext4").await.unwrap();
    assert!(place.images.resolve(&of_tenant(server.reference("a/b")), &|_| ()).await.is_err());
    // A mirror is the operator's.
    let mirrors = vec![format!("nowhere.example=http://{}", server.address).parse().unwrap()];
    let mirrored = Place::with(Options { mirrors, limits: quick(), ..Options::default() });
    mirrored.make_of(&of_tenant("nowhere.example/a/b"), "x.ext4").await.unwrap();
}

#[tokio::test]
async fn what_is_cached_of_one_repository_is_not_given_to_another() {
    let image = image();
    let owner = failing(&image, "nothing", 0, good).await;
    // It has the manifest and the configuration of another's image, and none of its layers.
    let layer = layer_of(&image);
    let thief = failing(&image, layer, usize::MAX, |_, _| crate::server::missing("BLOB_UNKNOWN")).await;
    let place = place();
    let (found, _) = place.make_of(&source(owner.reference("a/b")), "x.ext4").await.unwrap();
    for reference in [thief.reference("a/b"), thief.reference("other")] {
        let failed = place.make_of(&source(reference), "y.ext4").await.unwrap_err();
        assert!(matches!(failed, Error::NotFound { .. }), "{failed}");
    }
    // Neither is what a node keeps under the image's key.
    let stolen = place.images.resolve(&source(thief.reference("a/b")), &|_| ()).await.unwrap();
    assert_eq!(stolen.digest(), found.digest());
    assert_ne!(stolen.key(), found.key());
}

#[tokio::test]
async fn what_one_registry_holds_up_is_not_held_up_for_another() {
    let image = image();
    let layer = layer_of(&image);
    let slow = failing(&image, layer, usize::MAX, |image, asked| {
        let mut reply = good(image, asked);
        // A false beginning of the layer, and nothing more.
        reply.body = vec![0; reply.body.len()];
        reply.ending(End::Stall(1000))
    })
    .await;
    let whole = failing(&image, "nothing", 0, good).await;
    let place = Place::limited(Limits { idle: Duration::from_secs(20), ..quick() });
    let (held, free) = (source(slow.reference("a/b")), source(whole.reference("a/b")));
    let both = async {
        tokio::select! {
            ended = place.make_of(&held, "held.ext4") => panic!("{:?}", ended.map(drop)),
            made = async {
                while slow.times(layer) == 0 {
                    tokio::task::yield_now().await;
                }
                place.make_of(&free, "free.ext4").await
            } => made.map(drop),
        }
    };
    tokio::time::timeout(Duration::from_secs(10), both).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_false_beginning_that_a_mirror_leaves_is_not_gone_on_with() {
    let image = image();
    let registry = failing(&image, "nothing", 0, good).await;
    let lies = failing(&image, layer_of(&image), usize::MAX, |image, asked| {
        let mut reply = good(image, asked);
        reply.body = vec![0; reply.body.len()];
        reply.ending(End::Reset(1000))
    })
    .await;
    let mirrors = vec![format!("{}=http://{}", registry.address, lies.address).parse().unwrap()];
    let place = Place::with(Options { mirrors, limits: quick(), ..Options::default() });
    place.make_of(&source(registry.reference("a/b")), "x.ext4").await.unwrap();
    assert_eq!(Ext4::open(&place.path("x.ext4")).read("/noise").len(), 300_000);
    assert_eq!(registry.times(layer_of(&image)), 2, "on from what was there, and from the beginning");
}

#[tokio::test]
async fn a_document_that_trickles_is_ended() {
    let image = image();
    let server = failing(&image, "/manifests/", usize::MAX, |image, asked| {
        good(image, asked).ending(End::Trickle(Duration::from_millis(20)))
    })
    .await;
    let limits = Limits { document: Duration::from_millis(400), tries: 1, ..quick() };
    let place = Place::limited(limits);
    let failed = place.images.resolve(&source(server.reference("a/b")), &|_| ()).await.unwrap_err();
    assert!(failed.to_string().contains("too slow"), "{failed}");
}

#[tokio::test]
async fn a_layer_that_trickles_is_ended() {
    let image = image();
    let server = failing(&image, layer_of(&image), usize::MAX, |image, asked| {
        good(image, asked).ending(End::Trickle(Duration::from_millis(20)))
    })
    .await;
    let place = Place::limited(Limits { tries: 1, ..quick() });
    let failed = place.make_of(&source(server.reference("a/b")), "x.ext4").await.unwrap_err();
    assert!(matches!(&failed, Error::Unavailable { reason, .. } if reason.contains("bytes in")), "{failed}");
}
