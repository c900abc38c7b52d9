/* Owns: running over the ordinary members of a foreign tar; their headers made anew where asked.
 * Knows nothing of: what else a tar can hold and which of it is wanted: there it comes back. */
#ifndef NV_TAR_H
#define NV_TAR_H

#include <stdint.h>

#include "nv_wait.h"

/* Bits of nv_tar.filter. */
#define NV_TAR_FILTER_BITS (1u << 20)

/* A foreign tar that is run over. The caller gives everything up to the window, sets at, and zeroes
 * the rest. */
struct nv_tar {
    int32_t fd;
    int32_t renames;          /* make the headers anew, in the window */
    uint64_t size;            /* of the file */
    const uint8_t *templates; /* header blocks, in the order of enum nv_template */
    const char *prefix;       /* before every new name */
    uint32_t prefix_length;
    uint32_t skip_length;
    const char *skip;      /* what a member's own name must begin with, and loses */
    const uint8_t *filter; /* names the caller must look at; see nv_tar_note */
    const char *top;       /* the first part of the names that may pass; none while it is empty */
    uint32_t top_length;
    uint64_t room; /* of the window; at least a block */
    uint8_t *window;
    uint64_t window_at; /* the window's place in the file */
    uint64_t filled;
    uint64_t at; /* the next header */
    int64_t tick_ns;
    char last[100]; /* name of the member run over last, as it stood there */
};

/* Make every name with this hash, and what lies below one, come back to the caller. */
void nv_tar_note(uint8_t *filter, const char *name, uint64_t length);

/* Run over members that are files or directories and have nothing unusual, from t->at on; t->at is
 * then the first header that was left to the caller. With renames all headers run over lie in one
 * window, which has them as they must be. A window that is there and has the first header is not
 * read again. Returns 0; -NV_E_TICK, or what the system said: what was run over counts. */
int nv_tar_run(struct nv_tar *t);

#endif
