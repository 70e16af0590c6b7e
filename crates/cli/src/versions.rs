//! Versions of templates, as `kelvin template list` and `kelvin template info` show them.

use comfy_table::Table;
use kelvin_api::build::TemplateWithBuilds;
use kelvin_api::sandbox::{Template, VersionInfo};

use crate::output::{ago, pairs, table};

/// What a version is called after `name:`; what was imported has no name of its own.
fn called(version: &VersionInfo) -> String {
    version.build_id.as_ref().map(ToString::to_string).unwrap_or_default()
}

/// Whether this is the version that the row of its template is of.
fn is_shown(template: &Template, version: &VersionInfo) -> bool {
    match &version.build_id {
        Some(build) => template.build_id == build.as_str(),
        None => template.build_id == version.image,
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn snapshots(template: &Template) -> String {
    let one = |snapshot: &kelvin_api::sandbox::TemplateSnapshot| {
        format!("{} cpu {} MiB ({})", snapshot.cpu_count, snapshot.memory_mb, snapshot.waiting_vmms)
    };
    match template.snapshots.is_empty() {
        true => "none: creates are cold".to_owned(),
        false => template.snapshots.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

/// Templates: a row for each version, the one first that the name alone means.
pub fn list(templates: &Vec<Template>) -> Table {
    let mut table =
        table(&["name", "tags", "version", "built", "cpu", "memory", "disk", "snapshots (waiting VMMs)"]);
    for template in templates {
        let (shown, others): (Vec<_>, Vec<_>) =
            template.versions.iter().partition(|version| is_shown(template, version));
        let version = shown.first();
        table.add_row([
            template.template_id.clone(),
            version.map(|version| version.tags.join(" ")).unwrap_or_default(),
            version.map(|version| called(version)).unwrap_or_default(),
            ago(template.updated_at),
            template.cpu_count.to_string(),
            format!("{} MiB", template.memory_mb),
            format!("{} MiB", template.disk_size_mb),
            snapshots(template),
        ]);
        for version in others {
            table.add_row([String::new(), version.tags.join(" "), called(version), ago(version.created_at)]);
        }
    }
    table
}

/// One version of a template.
pub fn info(found: &TemplateWithBuilds) -> Table {
    let template = &found.template;
    let mut rows = vec![("name", template.template_id.clone())];
    if let Some(version) = template.versions.iter().find(|version| is_shown(template, version)) {
        let size = |all: u64, disk: u64| format!("{}, {} on the disk", mib(all), mib(disk));
        let memory = version.memory_disk_bytes.map_or_else(
            || "no snapshot in this shape".to_owned(),
            |disk| size(u64::from(template.memory_mb) << 20, disk),
        );
        rows.extend([
            ("version", called(version)),
            ("tags", version.tags.join(" ")),
            ("built", format!("{} ({})", version.created_at, ago(version.created_at))),
            ("from", version.from_digest.clone().unwrap_or_default()),
            ("image", version.image.clone()),
            ("image size", size(version.image_bytes, version.image_disk_bytes)),
            ("memory file", memory),
            ("kernel", version.kernel.clone()),
        ]);
    }
    rows.extend([
        ("cpus", template.cpu_count.to_string()),
        ("memory", format!("{} MiB", template.memory_mb)),
        ("disk", format!("{} MiB", template.disk_size_mb)),
        ("snapshots", snapshots(template)),
        ("versions", template.versions.len().to_string()),
        ("started", format!("{} times", template.spawn_count)),
    ]);
    pairs(rows)
}

#[cfg(test)]
mod tests {
    use kelvin_api::id::BuildId;

    use super::*;

    fn version(build: Option<&BuildId>, tags: &[&str]) -> VersionInfo {
        VersionInfo {
            build_id: build.cloned(),
            tags: tags.iter().map(ToString::to_string).collect(),
            image: "i".to_owned(),
            image_bytes: 1 << 30,
            image_disk_bytes: (200 << 20) + 1,
            memory_disk_bytes: build.map(|_| 60 << 20),
            kernel: "k".to_owned(),
            created_at: jiff::Timestamp::UNIX_EPOCH,
            from_digest: Some("sha256:1".to_owned()),
        }
    }

    fn template(build: Option<&BuildId>, versions: Vec<VersionInfo>) -> Template {
        let build = build.map_or("i", BuildId::as_str);
        let text = serde_json::json!({ "templateID": "web", "buildID": build, "cpuCount": 1, "memoryMB": 512,
            "diskSizeMB": 1024, "public": false, "aliases": [], "names": ["web"], "createdAt": "2026-11-27T00:00:00Z",
            "updatedAt": "2026-11-27T00:00:00Z", "createdBy": null, "lastSpawnedAt": null, "spawnCount": 2,
            "buildCount": 1, "envdVersion": "1", "buildStatus": "ready", "snapshots": [] });
        Template { versions, ..serde_json::from_value(text).unwrap() }
    }

    #[test]
    fn each_version_has_a_row_and_the_one_of_the_name_is_first() {
        let (old, new) = (BuildId::random(), BuildId::random());
        let versions =
            vec![version(Some(&new), &["v2"]), version(Some(&old), &["default", "v1"]), version(None, &[])];
        let text = list(&vec![template(Some(&old), versions)]).to_string();
        let rows: Vec<&str> = text.lines().filter(|line| line.contains("ago")).collect();
        assert_eq!(rows.len(), 3, "{text}");
        assert!(rows[0].contains("web") && rows[0].contains("default v1") && rows[0].contains(old.as_str()));
        assert!(
            rows[1].contains("v2") && rows[1].contains(new.as_str()) && !rows[1].contains("web"),
            "{text}"
        );
        // One that was imported, as a server of before there were versions tells it, too.
        for versions in [vec![version(None, &["default"])], Vec::new()] {
            assert_eq!(list(&vec![template(None, versions)]).to_string().matches("web").count(), 1);
        }
    }

    #[test]
    fn a_version_says_what_it_takes() {
        let build = BuildId::random();
        let of = |build: Option<&BuildId>| {
            let template = template(build, vec![version(build, &["default"])]);
            info(&TemplateWithBuilds { template, builds: Vec::new() }).to_string()
        };
        let text = of(Some(&build));
        for wanted in
            ["1024 MiB, 201 MiB on the disk", "512 MiB, 60 MiB on the disk", "sha256:1", build.as_str()]
        {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert!(of(None).contains("no snapshot in this shape"));
    }
}
