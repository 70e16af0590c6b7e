//! The tests of whole servers with real machines, one program: linked once, not for each file.

mod e2e;
