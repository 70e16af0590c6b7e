//! Generated from `proto/node.proto`.

connectrpc::include_generated!();

pub(super) use self::kelvin::node::v1 as pb;
