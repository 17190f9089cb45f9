//! The fuzzer of [`umbra_fuzz::hypercalls`].

#![no_main]

umbra_fuzz::fuzzer!(hypercalls);
