//! The fuzzer of [`umbra_fuzz::completion`].

#![no_main]

umbra_fuzz::fuzzer!(completion);
