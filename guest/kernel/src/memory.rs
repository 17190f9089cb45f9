//! Bindings to the kernel's allocators (`guest/kernel/memory`), which are compiled without the
//! sanitizer.

/// Pages.
pub mod page {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use umbra_guest::codes::PAGE_SIZE;

    use crate::layout::DIRECT_MAP;

    static END: AtomicU64 = AtomicU64::new(0);

    unsafe extern "C" {
        fn kernel_memory_init(start: u64, end: u64) -> u64;
        fn kernel_pages_alloc(order: usize) -> u64;
        fn kernel_pages_take(order: usize) -> u64;
        fn kernel_pages_give(at: u64);
        fn kernel_pages_free(at: u64);
    }

    /// Takes over the memory from `start` to `end` (guest-physical), and poisons all of it that is
    /// free.
    pub fn init(start: u64, end: u64) {
        END.store(DIRECT_MAP + end / PAGE_SIZE * PAGE_SIZE, Relaxed);
        // SAFETY: called once, with memory that is not in use.
        unsafe { kernel_memory_init(start, end) };
    }

    /// The end of memory, as an address of the direct map.
    pub fn end() -> u64 {
        END.load(Relaxed)
    }

    /// Allocates `1 << order` pages.
    pub fn alloc(order: usize) -> Option<u64> {
        // SAFETY: any order will do.
        Some(unsafe { kernel_pages_alloc(order) }).filter(|&at| at != 0)
    }

    /// Frees what [`alloc`] handed out; a bad address is reported.
    pub fn free(at: u64) {
        // SAFETY: any address will do.
        unsafe { kernel_pages_free(at) };
    }

    /// Takes `1 << order` pages for a stack, still poisoned.
    pub fn take(order: usize) -> Option<u64> {
        // SAFETY: any order will do.
        Some(unsafe { kernel_pages_take(order) }).filter(|&at| at != 0)
    }

    /// Returns pages from [`take`], poisoned again.
    pub fn give(at: u64) {
        // SAFETY: each thread returns its stack once.
        unsafe { kernel_pages_give(at) };
    }
}

/// Objects.
pub mod slab {
    mod ffi {
        unsafe extern "C" {
            pub fn kmalloc(bytes: u64) -> u64;
            pub fn kfree(at: u64);
            pub fn kfree_sensitive(at: u64);
            pub fn krealloc(at: u64, old: u64, new: u64) -> u64;
            pub fn ksize(at: u64) -> u64;
            pub fn kernel_slab_slot(cache: usize) -> u64;
            pub fn kmem_cache_create(name: *const u8, len: usize, object: u64) -> u32;
            pub fn kmem_cache_alloc(cache: u32) -> u64;
            pub fn kmem_cache_destroy(cache: u32);
        }
    }

    /// Allocates `bytes`, 16-byte aligned if they are 16 or more.
    #[inline(always)]
    pub fn kmalloc(bytes: u64) -> Option<u64> {
        // SAFETY: any size will do.
        Some(unsafe { ffi::kmalloc(bytes) }).filter(|&at| at != 0)
    }

    /// Frees what `kmalloc` handed out; a bad address is reported.
    #[inline(always)]
    pub fn kfree(at: u64) {
        // SAFETY: any address will do.
        unsafe { ffi::kfree(at) };
    }

    /// Frees what `kmalloc` handed out, and clears it first.
    #[inline(always)]
    pub fn kfree_sensitive(at: u64) {
        // SAFETY: any address will do.
        unsafe { ffi::kfree_sensitive(at) };
    }

    /// Changes an allocation's size. `None`, after a report, if it was freed.
    #[inline(always)]
    pub fn krealloc(at: u64, old: u64, new: u64) -> Option<u64> {
        // SAFETY: callers know an allocation's size.
        Some(unsafe { ffi::krealloc(at, old, new) }).filter(|&at| at != 0)
    }

    /// Makes an allocation's whole room accessible, and returns its bytes. 0, after a report, if it
    /// was freed.
    #[inline(always)]
    pub fn ksize(at: u64) -> u64 {
        // SAFETY: any address will do.
        unsafe { ffi::ksize(at) }
    }

    /// Bytes from one object to the next, for each cache.
    pub fn slots() -> impl Iterator<Item = u64> {
        // SAFETY: any number will do.
        (0..).map(|cache| unsafe { ffi::kernel_slab_slot(cache) }).take_while(|slot| *slot != 0)
    }

    /// A cache of equal objects.
    #[derive(Clone, Copy)]
    pub struct Cache(u32);

    impl Cache {
        /// Makes a cache for objects of `object` bytes (at most 4096).
        pub fn new(name: &'static str, object: u64) -> Option<Self> {
            // SAFETY: pointer and length are a string's.
            let cache = unsafe { ffi::kmem_cache_create(name.as_ptr(), name.len(), object) };
            (cache != u32::MAX).then_some(Self(cache))
        }

        /// Allocates an object.
        #[inline(always)]
        pub fn alloc(self) -> Option<u64> {
            // SAFETY: `new` made this cache.
            Some(unsafe { ffi::kmem_cache_alloc(self.0) }).filter(|&at| at != 0)
        }

        /// Allocates `objects.len()` objects at once, or none if there is not enough memory.
        pub fn alloc_bulk(self, objects: &mut [u64]) -> bool {
            for i in 0..objects.len() {
                let Some(object) = self.alloc() else {
                    objects[..i].iter().for_each(|&object| self.free(object));
                    return false;
                };
                objects[i] = object;
            }
            true
        }

        /// Frees an object of this cache.
        #[inline(always)]
        pub fn free(self, at: u64) {
            kfree(at);
        }

        /// Destroys the cache. Its number is not used again.
        pub fn destroy(self) {
            // SAFETY: `new` made this cache; a second time is found.
            unsafe { ffi::kmem_cache_destroy(self.0) };
        }
    }
}
