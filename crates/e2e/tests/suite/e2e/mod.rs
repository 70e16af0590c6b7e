//! By what they are about. One module, so that a run of the unit tests can leave it out.

mod authorisation;
mod crash;
mod exec;
mod firecracker;
mod fork;
mod freeze;
mod gateway;
mod groups;
mod guest;
mod hostile;
mod input;
mod integrity;
mod isolation;
mod jail;
mod kvm;
mod lifecycle;
mod network;
mod people;
mod power;
mod restart;
mod run;
mod sdk;
mod soak;
mod speed;
mod tenants;
mod warm;
