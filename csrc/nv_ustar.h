/* Owns: where the fields of a tar header block lie, and what is written into them.
 * Knows nothing of: members, files. */
#ifndef NV_USTAR_H
#define NV_USTAR_H

#include <stdint.h>
#include <string.h>

#define BLOCK 512u
#define NAME_AT 0
#define NAME_ROOM 100u
#define MODE_AT 100
#define MODE_ROOM 8
#define SIZE_AT 124
#define SIZE_DIGITS 11
#define CHECKSUM_AT 148
#define CHECKSUM_ROOM 8
#define CHECKSUM_DIGITS 6
#define TYPE_AT 156
#define LINK_AT 157
#define LINK_ROOM 100u
#define MAGIC_AT 257
#define PREFIX_AT 345
#define OCTAL_SIZE_MAX 077777777777u /* what eleven octal digits hold: 8 GiB less one */

/* The header blocks that members are made from, in the caller's memory one after the other. */
enum nv_template {
    NV_TEMPLATE_FILE = 0,
    NV_TEMPLATE_DIRECTORY = 1,
    NV_TEMPLATE_SYMLINK = 2,
    NV_TEMPLATE_LONG_NAME = 3
};

static inline uint64_t padded(uint64_t size) {
    return (size + BLOCK - 1) / BLOCK * BLOCK;
}

static inline void put_octal(uint8_t *field, int digits, uint64_t value) {
    while (digits-- > 0) {
        field[digits] = (uint8_t)('0' + (value & 7));
        value >>= 3;
    }
}

static inline uint32_t sum_of(const uint8_t *bytes, unsigned count) {
    uint32_t sum = 0;
    unsigned i;

    for (i = 0; i < count; i++)
        sum += bytes[i];
    return sum;
}

static inline void put_checksum(uint8_t *block) {
    uint8_t *field = block + CHECKSUM_AT;

    memset(field, ' ', CHECKSUM_ROOM);
    put_octal(field, CHECKSUM_DIGITS, sum_of(block, BLOCK));
    field[CHECKSUM_DIGITS] = 0;
}

#endif
