/* Owns: running over the ordinary members of a foreign tar; their headers made anew where asked.
 * Knows nothing of: what else a tar can hold and which of it is wanted: there it comes back. */
#include <errno.h>
#include <stdint.h>
#include <string.h>

#include "nv_sys.h"
#include "nv_tar.h"
#include "nv_ustar.h"

#define MAGIC_LENGTH 5u
#define FNV_OFFSET 2166136261u /* the hash FNV-1a */
#define FNV_PRIME 16777619u

struct member {
    const char *name; /* without "./", what is skipped, and a slash at its end */
    uint32_t length;
    uint32_t mode;
    uint64_t size;
    int is_directory;
};

static uint32_t hash_on(uint32_t hash, char c) {
    return (hash ^ (uint8_t)c) * FNV_PRIME;
}

static int is_noted(const struct nv_tar *t, uint32_t hash) {
    hash %= NV_TAR_FILTER_BITS;
    return t->filter[hash / 8] >> hash % 8 & 1;
}

void nv_tar_note(uint8_t *filter, const char *name, uint64_t length) {
    uint32_t hash = FNV_OFFSET;
    uint64_t i;

    for (i = 0; i < length; i++)
        hash = hash_on(hash, name[i]);
    hash %= NV_TAR_FILTER_BITS;
    filter[hash / 8] = (uint8_t)(filter[hash / 8] | 1u << hash % 8);
}

/* `count` octal digits and a NUL or space: what nearly every tar has, and nothing else. */
static int get_octal(const uint8_t *field, unsigned count, uint64_t *value) {
    unsigned i;

    *value = 0;
    for (i = 0; i < count; i++) {
        if (field[i] < '0' || field[i] > '7')
            return 0;
        *value = *value << 3 | (unsigned)(field[i] - '0');
    }
    return field[count] == 0 || field[count] == ' ';
}

/* Whether a part of a name begins here that is empty, "." or "..". */
static int is_dotted(const char *at, const char *end) {
    const char *dots = at;

    while (dots < end && dots - at < 2 && *dots == '.')
        dots++;
    return dots == end || *dots == '/';
}

/* Whether nothing about a name needs a closer look: it lies where the caller has let others pass,
 * and neither itself nor a directory above it is noted. */
static int is_plain(const struct nv_tar *t, const struct member *m) {
    const char *end = m->name + m->length;
    uint32_t hash = FNV_OFFSET;
    const char *c;

    if (t->top_length == 0 || m->length <= t->top_length || m->name[t->top_length] != '/' ||
        memcmp(m->name, t->top, t->top_length) != 0)
        return 0;
    for (c = m->name; c < end; c++) {
        if (c == m->name || c[-1] == '/') {
            if (is_dotted(c, end))
                return 0;
        } else if (*c == '/' && is_noted(t, hash)) {
            return 0;
        }
        hash = hash_on(hash, *c);
    }
    return c[-1] != '/' && !is_noted(t, hash);
}

static int has_known_form(const uint8_t *block) {
    const uint8_t *magic = block + MAGIC_AT;

    if (memcmp(magic, "ustar", MAGIC_LENGTH) != 0)
        return 0;
    /* In POSIX's form the name goes on in the prefix; GNU has something else there. */
    return magic[MAGIC_LENGTH] == ' ' || (magic[MAGIC_LENGTH] == 0 && block[PREFIX_AT] == 0);
}

static int is_summed_up(const uint8_t *block) {
    const uint8_t *field = block + CHECKSUM_AT;
    uint64_t said;

    return get_octal(field, CHECKSUM_DIGITS, &said) &&
           said == sum_of(block, BLOCK) - sum_of(field, CHECKSUM_ROOM) + CHECKSUM_ROOM * ' ';
}

/* Whether a header is that of an ordinary file or directory; of anything else the caller knows. */
static int is_ordinary(const struct nv_tar *t, const uint8_t *block, struct member *m) {
    uint8_t type = block[TYPE_AT];
    uint64_t mode;

    if ((type != '0' && type != 0 && type != '5') || !has_known_form(block) ||
        !is_summed_up(block) || !get_octal(block + MODE_AT, MODE_ROOM - 1, &mode) ||
        !get_octal(block + SIZE_AT, SIZE_DIGITS, &m->size))
        return 0;
    m->mode = (uint32_t)mode & 07777;
    m->is_directory = type == '5';
    m->name = (const char *)block + NAME_AT;
    m->length = (uint32_t)strnlen(m->name, NAME_ROOM);
    if (m->is_directory && m->size > 0)
        return 0;
    if (m->is_directory && m->length > 0 && m->name[m->length - 1] == '/')
        m->length--;
    if (m->length > 2 && memcmp(m->name, "./", 2) == 0) {
        m->name += 2;
        m->length -= 2;
    }
    if (m->length < t->skip_length || memcmp(m->name, t->skip, t->skip_length) != 0)
        return 0;
    m->name += t->skip_length;
    m->length -= t->skip_length;
    return t->prefix_length + m->length + (m->is_directory ? 1u : 0u) <= NAME_ROOM &&
           is_plain(t, m);
}

static void put_member(const struct nv_tar *t, const struct member *m, uint8_t *block) {
    unsigned which = m->is_directory ? NV_TEMPLATE_DIRECTORY : NV_TEMPLATE_FILE;
    uint8_t made[BLOCK];

    memcpy(made, t->templates + which * BLOCK, BLOCK);
    memcpy(made + NAME_AT, t->prefix, t->prefix_length);
    memcpy(made + NAME_AT + t->prefix_length, m->name, m->length);
    if (m->is_directory)
        made[NAME_AT + t->prefix_length + m->length] = '/';
    put_octal(made + MODE_AT, MODE_ROOM - 1, m->mode);
    put_octal(made + SIZE_AT, SIZE_DIGITS, m->size);
    put_checksum(made);
    memcpy(block, made, BLOCK);
}

/* Fill the window from `at` on. Returns 1; 0 where the file has no whole header there; or what the
 * system said. */
static int fill_window(struct nv_tar *t) {
    uint64_t left = t->size - t->at;
    uint64_t want = left < t->room ? left : t->room;

    t->window_at = t->at;
    t->filled = 0;
    while (t->filled < want) {
        int64_t got = nv_sys_pread(t->fd, t->window + t->filled, (size_t)(want - t->filled),
                                   (off_t)(t->at + t->filled));

        if (got < 0)
            return (int)got;
        if (got == 0)
            break;
        t->filled += (uint64_t)got;
    }
    return t->filled >= BLOCK;
}

static int is_in_window(const struct nv_tar *t) {
    uint64_t index = t->at - t->window_at;

    return t->at >= t->window_at && index < t->filled && t->filled - index >= BLOCK;
}

int nv_tar_run(struct nv_tar *t) {
    uint64_t began = t->at;
    struct member m;

    for (;;) {
        uint8_t *block;
        uint64_t rest;

        if (nv_sys_now_ns() >= t->tick_ns)
            return -NV_E_TICK;
        if (!is_in_window(t)) {
            int ret = t->renames && t->at > began ? 0 : fill_window(t);

            if (ret <= 0)
                return ret;
        }
        block = t->window + (t->at - t->window_at);
        if (!is_ordinary(t, block, &m))
            return 0;
        rest = t->size - t->at - BLOCK;
        if (padded(m.size) > rest)
            return 0;
        memcpy(t->last, block + NAME_AT, NAME_ROOM);
        if (t->renames)
            put_member(t, &m, block);
        t->at += BLOCK + padded(m.size);
    }
}
