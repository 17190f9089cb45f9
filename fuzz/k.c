/*
 * The source of the seeds that compilers made, by gcc 12 and clang 14:
 *
 *   flags="-O1 -g -ffreestanding -fno-asynchronous-unwind-tables"
 *   link="-nostdlib -static -Wl,-Ttext=0x100000,-e,main,--build-id=none,-n,-z,max-page-size=16"
 *   gcc $flags -gdwarf-5 $link k.c -o symbols/dwarf5.elf     (loader/gcc.elf is the same)
 *   gcc $flags -gdwarf-4 $link k.c -o symbols/dwarf4.elf
 *   gcc $flags $link,--compress-debug-sections=zlib k.c -o symbols/compressed.elf
 *   gcc $flags -fno-pic -c k.c -o symbols/gcc.ko
 *   clang $flags -gdwarf-5 -c k.c -o symbols/clang.ko
 */
int x = 7;
static inline __attribute__((always_inline)) int g(int a) { return a * x; }
int f(int a) { return g(a) + 1; }
int main(void) { return f(2); }
