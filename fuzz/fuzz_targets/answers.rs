//! The fuzzer of [`umbra_fuzz::answers`].

#![no_main]

umbra_fuzz::fuzzer!(answers);
