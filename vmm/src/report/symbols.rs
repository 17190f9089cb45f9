//! Names and lines of guest addresses.
