        /* A line table of DWARF 4 with one file. Its tests put in its name, and its rows. */
        .long 2f - 1f
        1: .short 4
        .long 4f - 3f
        3: .byte 1, 1, 1, 0xfb, 14, 13
        .byte 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1
        .byte 0
        FILE
        .byte 0, 0, 0, 0
        4:
        ROWS
        .byte 0, 1, 1
        2:
