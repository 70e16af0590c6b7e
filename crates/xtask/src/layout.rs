//! The base image as an OCI image layout: what `kelvin bench build` pulls and builds on.
//!
//! ```text
//! .cache/guest/base.ext4 ──mounted, read only──> four archives ──gzip──> .cache/guest/base-layout/
//! ```
//!
//! Several layers, as an image of a registry has them, and none of the guest kernel's modules, which no such image has. It is made
//! again when the image is, under another name, and renamed: what has its name is whole. The mount is of a mount namespace that ends
//! with the program, however that ends.
//!
//! Source: OCI image specification, `image-layout.md`, `manifest.md`, `config.md`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::packages::as_root;
use crate::stamps::is_fresh;
use crate::{Result, cache, files as fs, output, run, say};

/// Mounts the image `$1` on `$2` and packs it into `$3`: of each layer the digest of its archive, of what it is packed to, and the
/// length of that, in a line. A file belongs to the first layer that names it.
const PACK: &str = r#"
set -eu
mount -o ro,loop,noload "$1" "$2"
cd "$2"
pack() {
    name=$1
    shift
    tar --create --numeric-owner --sort=name --xattrs --xattrs-include='*' --file "$out/$name.tar" \
        --exclude=./lost+found --exclude='./usr/lib/modules/*' "$@"
    plain=$(sha256sum <"$out/$name.tar" | cut -c 1-64)
    gzip --no-name "$out/$name.tar"
    packed=$(sha256sum <"$out/$name.tar.gz" | cut -c 1-64)
    echo "$plain $packed $(stat -c %s "$out/$name.tar.gz")"
    mv "$out/$name.tar.gz" "$out/blobs/sha256/$packed"
}
out=$3
pack system --exclude='./usr/lib/*' --exclude='./usr/share/*' .
pack share ./usr/share
pack libraries --exclude='./usr/lib/python3*' ./usr/lib
pack python ./usr/lib/python3*
chown -R --reference="$out" "$out"
"#;

/// A layer as the script tells of it.
struct Layer<'a> {
    plain: &'a str,
    packed: &'a str,
    size: &'a str,
}

fn layers(said: &str) -> Result<Vec<Layer<'_>>> {
    let layer = |line| match str::split_whitespace(line).collect::<Vec<_>>()[..] {
        [plain, packed, size] if plain.len() == 64 && packed.len() == 64 => Ok(Layer { plain, packed, size }),
        _ => Err(format!("packing a layer said {line:?}").into()),
    };
    said.lines().map(layer).collect()
}

fn quoted_list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(",")
}

/// Puts `bytes` into the layout; its descriptor.
fn put(layout: &Path, kind: &str, bytes: &str) -> Result<String> {
    let file = layout.join("new");
    fs::write(&file, bytes)?;
    let said = output(std::process::Command::new("sha256sum").arg(&file))?;
    let digest = said.split_whitespace().next().unwrap_or_default().to_owned();
    fs::rename(&file, layout.join("blobs/sha256").join(&digest))?;
    Ok(format!(
        r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"sha256:{digest}","size":{}}}"#,
        bytes.len()
    ))
}

fn write(layout: &Path, layers: &[Layer<'_>]) -> Result<()> {
    let digests = quoted_list(layers.iter().map(|layer| format!("\"sha256:{}\"", layer.plain)));
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":[{digests}]}}}}"#
    );
    let config = put(layout, "config.v1+json", &config)?;
    let parts = quoted_list(layers.iter().map(|Layer { packed, size, .. }| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:{packed}","size":{size}}}"#
        )
    }));
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{config},"layers":[{parts}]}}"#
    );
    let manifest = put(layout, "manifest.v1+json", &manifest)?;
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{manifest}]}}"#
    );
    fs::write(layout.join("index.json"), index)?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).map_err(Into::into)
}

/// Makes it of the image `rootfs`, when it is missing or of another one.
pub fn ensure(rootfs: &Path) -> Result<PathBuf> {
    let directory = cache().join("guest");
    let (done, stamp) = (directory.join("base-layout"), directory.join("base-layout.key"));
    let found = fs::metadata(rootfs)?;
    let key = format!("{} {} {} {PACK}", found.len(), found.mtime(), found.mtime_nsec());
    let key = crate::stamps::digest(&[key.as_bytes()]);
    if done.exists() && is_fresh(&stamp, &key) {
        return Ok(done);
    }
    say("packing the base image as an OCI image layout");
    let (fresh, mounted) = (directory.join("base-layout.new"), directory.join("base-layout.mnt"));
    run(as_root("rm").arg("-rf").arg("--one-file-system").args([&fresh, &done]))?;
    fs::create_dir_all(fresh.join("blobs/sha256"))?;
    fs::create_dir_all(&mounted)?;
    let mut pack = as_root("unshare");
    pack.args(["--mount", "--propagation", "private", "sh", "-c", PACK, "sh"]);
    let said = output(pack.arg(rootfs).arg(&mounted).arg(&fresh))?;
    write(&fresh, &layers(&said)?)?;
    fs::rename(&fresh, &done)?;
    fs::write(stamp, key)?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_names_its_layers_by_digest() {
        let directory = std::env::temp_dir().join(format!("kelvin-layout-{}", std::process::id()));
        fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        let (plain, packed) = ("a".repeat(64), "b".repeat(64));
        let said = format!("{plain} {packed} 12\n");
        write(&directory, &layers(&said).unwrap()).unwrap();
        let index = fs::read_to_string(directory.join("index.json")).unwrap();
        let digest = index.split("sha256:").nth(1).unwrap().get(..64).unwrap();
        let manifest = fs::read_to_string(directory.join("blobs/sha256").join(digest)).unwrap();
        assert!(manifest.contains(&format!("\"sha256:{packed}\",\"size\":12")), "{manifest}");
        let digest = manifest.split("sha256:").nth(1).unwrap().get(..64).unwrap();
        let config = fs::read_to_string(directory.join("blobs/sha256").join(digest)).unwrap();
        assert!(config.contains(&plain) && manifest.contains(&format!("\"size\":{}", config.len())));
        fs::remove_dir_all(&directory).unwrap();
        assert!(layers("gzip: no space left").is_err());
    }
}
