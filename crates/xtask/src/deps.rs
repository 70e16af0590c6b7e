use crate::Result; pub fn check()->Result<()>{Ok(())}
