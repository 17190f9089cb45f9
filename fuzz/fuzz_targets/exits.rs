//! The fuzzer of [`umbra_fuzz::exits`].

#![no_main]

umbra_fuzz::fuzzer!(exits);
