//! The fuzzer of [`umbra_fuzz::loader`].

#![no_main]

umbra_fuzz::fuzzer!(loader);
