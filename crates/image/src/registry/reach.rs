//! Which addresses are connected to: the rule against requests that a tenant has the node make for it (SSRF).
//!
//! A reference, a redirect and the service that gives tokens are all the tenant's or its registry's to name. Names are judged by
//! what they resolve to, in the same step that connects, so that a name cannot mean something else a moment later.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::client::legacy::connect::dns::Name;
use kelvin_api::network::is_never;
use tower::Service;

/// Which addresses a pull may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Those of the internet: what a tenant may make the node do.
    Public,
    /// Every address, this machine's and private ones too: the operator's own pulls.
    Any,
}

/// An address that [`Reach::Public`] does not have.
#[derive(Debug, thiserror::Error)]
#[error("it leads to an address of this machine or of a private network")]
pub(super) struct NotPublic;

impl Reach {
    fn allows(self, address: IpAddr) -> bool {
        self == Self::Any || (is_public(address) && !is_own(address))
    }

    /// Refuses an address that stands in `uri` itself: the connector resolves none of those.
    pub(super) fn check(self, uri: &Uri) -> Result<(), NotPublic> {
        let host = uri.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        match bare.parse() {
            Ok(address) if !self.allows(address) => Err(NotPublic),
            _ => Ok(()),
        }
    }
}

/// Whether an address is one of the internet. Source: IANA's registries of special-purpose addresses.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => !is_never(&address.into()),
        IpAddr::V6(address) => match address.segments() {
            // NAT64: it is the IPv4 address in it.
            [0x64, 0xff9b, 0, 0, 0, 0, ..] => {
                let [.., a, b, c, d] = address.octets();
                is_public(IpAddr::from([a, b, c, d]))
            }
            // Teredo and others of the IETF, documentation, 6to4: none of them is a registry's.
            [0x2001, 0..=0x1ff | 0xdb8, ..] | [0x2002 | 0x3fff, ..] => false,
            [first, ..] => first & 0xe000 == 0x2000,
        },
    }
}

/// Whether an address is this machine's: only those can be bound. They change, so no list of them is kept. What cannot be told
/// is taken for one: descriptors that ran out open no door.
fn is_own(address: IpAddr) -> bool {
    let bound = UdpSocket::bind((address, 0));
    !matches!(bound, Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable)
}

/// Resolves names, and gives what may be connected to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resolver(pub(super) Reach);

type Addresses = std::vec::IntoIter<SocketAddr>;
type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Service<Name> for Resolver {
    type Response = Addresses;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Addresses, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let reach = self.0;
        Box::pin(async move {
            let found: Vec<_> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let had = found.len();
            let may: Vec<_> = found.into_iter().filter(|found| reach.allows(found.ip())).collect();
            if may.is_empty() && had > 0 {
                return Err(NotPublic.into());
            }
            Ok(may.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_machine_and_of_private_networks_are_not_public() {
        for private in [
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::808:808",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!Reach::Public.allows(private.parse().unwrap()), "{private}");
            assert!(Reach::Any.allows(private.parse().unwrap()), "{private}");
        }
        for public in
            ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2606:4700::1111", "2001:4860:4860::8888"]
        {
            assert!(Reach::Public.allows(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn an_address_in_a_url_is_judged_without_a_name() {
        for (uri, may) in [
            ("https://10.0.0.1/v2/", false),
            ("https://[::1]:5000/v2/", false),
            ("https://[::ffff:169.254.169.254]/", false),
            ("https://8.8.8.8/", true),
            // What it means is found when it is connected to.
            ("https://localhost/", true),
        ] {
            assert_eq!(Reach::Public.check(&uri.parse().unwrap()).is_ok(), may, "{uri}");
        }
    }

    #[tokio::test]
    async fn a_name_is_judged_by_what_it_resolves_to() {
        let name: Name = "localhost".parse().unwrap();
        let failed = Resolver(Reach::Public).call(name.clone()).await.unwrap_err();
        assert!(failed.downcast_ref::<NotPublic>().is_some(), "{failed}");
        assert!(Resolver(Reach::Any).call(name).await.unwrap().count() > 0);
    }
}
