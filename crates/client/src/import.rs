//! Imports, told of line by line.

use http::{Method, header};
use http_body_util::{BodyExt, Limited};
use kelvin_api::import::{IMPORT_EVENTS, ImportEvent, ImportProgress, ImportTemplate};
use kelvin_api::sandbox::Template;

use crate::{Client, Error, MAX_REPLY, decode, refused, segment, whole};

/// The largest line of a reply that comes line by line.
const MAX_EVENT: usize = 1 << 20;

impl Client {
    /// Makes a template of files on the server's machine. `told` hears how far it is. The import goes on when this is
    /// dropped.
    ///
    /// # Errors
    /// Any of [`Error`]; `Reply` when the server went away before it said how the import ended.
    pub async fn import(
        &self,
        template: &str,
        request: &ImportTemplate,
        mut told: impl FnMut(ImportProgress),
    ) -> Result<Template, Error> {
        let bytes = serde_json::to_vec(request).map_err(|error| Error::Reply(error.into()))?;
        let request = self
            .request(Method::POST, &format!("/templates/{}/import", segment(template)))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, IMPORT_EVENTS)
            .body(whole(bytes))
            .map_err(|error| Error::Reply(error.into()))?;
        let (parts, mut body) = self.send(request).await?.into_parts();
        if !parts.status.is_success() {
            let bytes = Limited::new(body, MAX_REPLY).collect().await.map_err(Error::Reply)?.to_bytes();
            return Err(refused(parts.status, &bytes));
        }
        let is_told = parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == IMPORT_EVENTS);
        if !is_told {
            return decode(&Limited::new(body, MAX_REPLY).collect().await.map_err(Error::Reply)?.to_bytes());
        }
        let mut held = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|error| Error::Reply(error.into()))?.into_data() else { continue };
            held.extend_from_slice(&data);
            while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = held.drain(..=end).collect();
                match decode(&line.into())? {
                    ImportEvent::Progress(progress) => told(progress),
                    ImportEvent::Template(template) => return Ok(*template),
                    ImportEvent::Error(error) => return Err(error.into()),
                }
            }
            if held.len() > MAX_EVENT {
                return Err(Error::Reply("a line of it is too long".into()));
            }
        }
        Err(Error::Reply("it was cut; the import may go on".into()))
    }
}
