//! The fuzzer of [`umbra_fuzz::symbols`].

#![no_main]

umbra_fuzz::fuzzer!(symbols);
