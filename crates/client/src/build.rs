//! Builds of templates.

use bytes::Bytes;
use futures::stream;
use http::{Method, Request};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::Frame;
use kelvin_api::build::{
    BuildInfo, FilesUpload, NewTemplate, RequestedTemplate, StartBuild, TemplateWithBuilds,
};
use tokio::sync::mpsc;

use crate::{Client, Error, MAX_REPLY, decode, refused, segment};

/// Bytes of an upload, piece by piece; a piece that is an error breaks it off.
pub type Pieces = mpsc::Receiver<std::io::Result<Vec<u8>>>;

impl Client {
    /// Asks for a build of a template. Its files are uploaded next, then it is started.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn request_build(&self, wanted: &NewTemplate) -> Result<RequestedTemplate, Error> {
        decode(&self.call(Method::POST, "/v3/templates", &[], Some(wanted)).await?.2)
    }

    /// Where to upload the files `hash` for a build of `template`, and whether they are there already.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn files_link(&self, template: &str, hash: &str) -> Result<FilesUpload, Error> {
        self.get(&format!("/templates/{}/files/{}", segment(template), segment(hash))).await
    }

    /// Uploads a tar to `url`, which carries its own signature: no API key is shown.
    ///
    /// # Errors
    /// Any of [`Error`]; `Unreachable` when a piece is an error.
    pub async fn upload_files(&self, url: &str, pieces: Pieces) -> Result<(), Error> {
        let content = stream::unfold(pieces, |mut pieces| async move {
            let piece = pieces.recv().await?;
            Some((piece.map(|bytes| Frame::data(Bytes::from(bytes))), pieces))
        });
        let request = Request::builder()
            .method(Method::PUT)
            .uri(url)
            .body(StreamBody::new(content).boxed_unsync())
            .map_err(|error| Error::Reply(error.into()))?;
        let (parts, body) = self.send(request).await?.into_parts();
        let bytes = Limited::new(body, MAX_REPLY).collect().await.map_err(Error::Reply)?.to_bytes();
        if parts.status.is_success() { Ok(()) } else { Err(refused(parts.status, &bytes)) }
    }

    /// Starts a build that was asked for; a former one of the template is given up.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn start_build(&self, template: &str, build: &str, start: &StartBuild) -> Result<(), Error> {
        let path = format!("/v2/templates/{}/builds/{}", segment(template), segment(build));
        self.call(Method::POST, &path, &[], Some(start)).await.map(drop)
    }

    /// How far a build is, and what it said after its first `skip` lines: at most 100 of them.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn build_status(&self, template: &str, build: &str, skip: usize) -> Result<BuildInfo, Error> {
        let (template, build) = (segment(template), segment(build));
        self.get(&format!("/templates/{template}/builds/{build}/status?logsOffset={skip}")).await
    }

    /// How far a build is, by its id alone.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn find_build(&self, build: &str) -> Result<BuildInfo, Error> {
        self.get(&format!("/builds/{}", segment(build))).await
    }

    /// Gives a build up; when this returns nothing of it runs any more.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn cancel_build(&self, template: &str, build: &str) -> Result<(), Error> {
        let path = format!("/templates/{}/builds/{}", segment(template), segment(build));
        self.call::<()>(Method::DELETE, &path, &[], None).await.map(drop)
    }

    /// A template, or with `:tag` or the id of a build a version of it, with its builds, newest first, at most 100.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn template(&self, name: &str) -> Result<TemplateWithBuilds, Error> {
        self.get(&format!("/templates/{}", segment(name))).await
    }

    /// Has `tags` name the version that `target` means, `name`, `name:tag` or `name:build`: all of them, in one step.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn add_tags(&self, target: &str, tags: &[String]) -> Result<(), Error> {
        let body = serde_json::json!({ "target": target, "tags": tags });
        self.call(Method::POST, "/templates/tags", &[], Some(&body)).await.map(drop)
    }

    /// Takes tags from a template: all of them, or none.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn remove_tags(&self, name: &str, tags: &[String]) -> Result<(), Error> {
        let body = serde_json::json!({ "name": name, "tags": tags });
        self.call(Method::DELETE, "/templates/tags", &[], Some(&body)).await.map(drop)
    }

    /// Deletes a template that was built, with its versions, builds and tags; with `:tag` the tag, and the version that no other
    /// names. Sandboxes and snapshots of it stay.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn delete_template(&self, name: &str) -> Result<(), Error> {
        self.call::<()>(Method::DELETE, &format!("/templates/{}", segment(name)), &[], None).await.map(drop)
    }
}
