//! `network` of a create and of an update: every field honoured or refused by name.

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::Token;
use kelvin_api::network::{
    Attachment, NetworkConfig, NetworkUpdate, NewNetwork, Policy, PolicyError, Wanted, Word,
};

/// The longest `maskRequestHost`. Source: RFC 1035, 2.3.4.
const HOST: usize = 255;

fn refused(error: &PolicyError) -> Failure {
    let remedy = match error {
        PolicyError::DomainsWithoutDeny => "add 0.0.0.0/0 to denyOut, or set allow_internet_access to false",
        PolicyError::Never(_) => {
            "private, link-local and metadata addresses and the host are closed for every sandbox"
        }
        PolicyError::DeniedDomain(_) => "deny 0.0.0.0/0 and allow the domains that are needed",
        _ => {
            "use addresses (1.2.3.4), blocks (1.2.3.0/24) and, in allowOut, domains (example.com, *.example.com)"
        }
    };
    Failure::new(ErrorCode::InvalidNetwork, error.to_string(), remedy)
}

fn unsupported(field: &str) -> Failure {
    Failure::new(
        ErrorCode::UnsupportedField,
        format!("network.{field} is not supported by this version"),
        "leave the field out",
    )
}

fn is_used(value: Option<&serde_json::Value>) -> bool {
    value.is_some_and(|value| !value.is_null() && value.as_object().is_none_or(|map| !map.is_empty()))
}

fn make(
    allow: Option<Vec<String>>,
    deny: Option<Vec<String>>,
    internet: Option<bool>,
    limits: (Option<u32>, Option<u32>),
) -> Result<Policy, Failure> {
    Policy::parse(&allow.unwrap_or_default(), &deny.unwrap_or_default(), internet)
        .and_then(|policy| policy.limited(limits.0, limits.1))
        .map_err(|error| refused(&error))
}

/// The policy of an update.
pub fn policy(update: NetworkUpdate) -> Result<Policy, Failure> {
    if is_used(update.egress_proxy.as_ref()) {
        return Err(unsupported("egressProxy"));
    }
    if is_used(update.rules.as_ref()) {
        return Err(unsupported("rules"));
    }
    let limits = (update.bandwidth_mbit, update.max_connections);
    make(update.allow_out, update.deny_out, update.allow_internet_access, limits)
}

/// What a create wants.
pub fn wanted(network: Option<NewNetwork>, internet: Option<bool>) -> Result<Wanted, Failure> {
    let config = match network {
        Some(NewNetwork::Word(Word::None)) => return Ok(Wanted::None),
        Some(NewNetwork::Config(config)) => *config,
        None => NetworkConfig::default(),
    };
    // Denying what a node has no network for anyway is no demand; everything else that is said is one.
    let demands = config != NetworkConfig::default() || internet == Some(true);
    if is_used(config.egress_proxy.as_ref()) {
        return Err(unsupported("egressProxy"));
    }
    if is_used(config.rules.as_ref()) {
        return Err(unsupported("rules"));
    }
    if let Some(mask) = &config.mask_request_host
        && (mask.is_empty()
            || mask.len() > HOST
            || http::HeaderValue::from_str(mask).is_err()
            || mask.contains(['/', ' ']))
    {
        return Err(Failure::new(
            ErrorCode::InvalidNetwork,
            "network.maskRequestHost is no host",
            "use a name with an optional port, for example localhost:${PORT}",
        ));
    }
    let limits = (config.bandwidth_mbit, config.max_connections);
    let attachment = Attachment {
        policy: make(config.allow_out, config.deny_out, internet, limits)?,
        traffic_token: (config.allow_public_traffic == Some(false)).then(Token::random),
        mask_request_host: config.mask_request_host,
    };
    Ok(if demands { Wanted::Required(attachment) } else { Wanted::Usual(attachment) })
}

/// What callers of private ports show.
pub fn traffic_token(wanted: &Wanted) -> Option<Token> {
    match wanted {
        Wanted::None => None,
        Wanted::Usual(attachment) | Wanted::Required(attachment) => attachment.traffic_token.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Wanted, Failure> {
        wanted(Some(serde_json::from_str(json).unwrap()), None)
    }

    #[test]
    fn every_field_is_honoured_or_refused() {
        assert_eq!(read("\"none\"").unwrap(), Wanted::None);
        assert!(matches!(wanted(None, None), Ok(Wanted::Usual(_))));
        assert!(
            matches!(wanted(None, Some(false)), Ok(Wanted::Usual(attachment)) if attachment.policy.denies_all())
        );
        assert!(matches!(wanted(None, Some(true)), Ok(Wanted::Required(_))));
        let private = read(r#"{"allowPublicTraffic": false}"#).unwrap();
        assert!(traffic_token(&private).is_some());
        for (json, code) in [
            (r#"{"egressProxy": {"address": "x:1"}}"#, ErrorCode::UnsupportedField),
            (r#"{"rules": {"a.com": []}}"#, ErrorCode::UnsupportedField),
            (r#"{"maskRequestHost": "a b"}"#, ErrorCode::InvalidNetwork),
            (r#"{"allowOut": ["a.com"]}"#, ErrorCode::InvalidNetwork),
            (r#"{"allowOut": ["169.254.169.254"]}"#, ErrorCode::InvalidNetwork),
            (r#"{"maxConnections": 0}"#, ErrorCode::InvalidNetwork),
        ] {
            assert_eq!(read(json).unwrap_err().error_code, code, "{json}");
        }
        assert!(read(r#"{"egressProxy": null, "rules": {}}"#).is_ok());
    }
}
