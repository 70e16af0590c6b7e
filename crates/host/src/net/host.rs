//! What this host has for slots: whether it can have them, what stands in their way, which link leads out. Nothing is
//! written: what is tried is tried in a namespace that ends with it.

use std::io;

use super::error::Error;
use super::{link, nft, ns};

/// Whether this host can have slots, tried and not guessed: root, `/dev/net/tun`, `libnftables`, and a
/// namespace in which all of it works.
///
/// # Errors
/// `Unavailable` with the first thing that is missing and what to do.
pub async fn check() -> Result<(), Error> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Unavailable("it needs root; run the server as root".to_owned()));
    }
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/net/tun") {
        return Err(Error::Unavailable(format!("/dev/net/tun: {error}; run `modprobe tun`")));
    }
    if let Err(error) = nft::check() {
        return Err(Error::Unavailable(format!("{error}; run `apt-get install libnftables1`")));
    }
    let tried = ns::on_thread(|| {
        ns::unshare()?;
        nft::run(
            "add table inet kelvin_check; add chain inet kelvin_check c { type nat hook postrouting priority srcnat; }; add rule inet kelvin_check c masquerade",
        )
    });
    match tried.await {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Error::Unavailable(format!("network namespaces with nftables do not work here: {error}")))
        }
    }
}

/// Another firewall's chain that drops what is forwarded unless it says otherwise, as Docker's does: a packet that our
/// rules accept is dropped there, and what a sandbox sends into the internet is lost without a word.
///
/// # Errors
/// As nftables gives them.
pub async fn foreign_drop() -> io::Result<Option<String>> {
    let text = ns::on_thread(|| nft::run("list chains")).await?;
    let parsed: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let chains = parsed["nftables"].as_array().into_iter().flatten().map(|item| &item["chain"]);
    let found = chains
        .filter(|chain| chain["hook"] == "forward" && chain["policy"] == "drop" && chain["family"] != "ip6")
        .map(|chain| ["family", "table", "name"].map(|key| chain[key].as_str().unwrap_or_default()).join(" "))
        .next();
    Ok(found)
}

/// The link of the host's default route.
///
/// # Errors
/// As netlink gives them.
pub async fn default_uplink() -> io::Result<Option<String>> {
    let routes = link::routes().await?;
    let index = routes.into_iter().find_map(|(_, prefix, index)| index.filter(|_| prefix == 0));
    index.map(link::name).transpose()
}
