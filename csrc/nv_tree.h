/* Owns: looking at directories, and gathering a tree's small files as members of a tar.
 * Knows nothing of: which names are wanted, who gets the members. */
#ifndef NV_TREE_H
#define NV_TREE_H

#include <stdint.h>

#include "nv_wait.h"

/* What becomes of a name in a directory. */
enum nv_kind {
    NV_DROPPED = 0,   /* not in the archive; for the caller to set */
    NV_FILE = 1,      /* gathered: header, data, padding */
    NV_LARGE = 2,     /* header gathered, file opened for the caller */
    NV_DIRECTORY = 3, /* header gathered, directory opened for the caller */
    NV_SYMLINK = 4,   /* gathered */
    NV_SHARED = 5,    /* a regular file with several names: the caller's, or to be set anew */
    NV_OTHER = 6      /* the caller's: devices, FIFOs, sockets, 8 GiB and more, odd link targets */
};

/* A name in a directory, as it was seen. name is an offset into the names, each ended by a NUL. */
struct nv_entry {
    uint64_t dev, ino, rdev, size;
    int64_t mtime_ns, ctime_ns;
    uint32_t mode;
    uint32_t name;
    uint16_t name_length;
    uint16_t kind; /* enum nv_kind */
};

/* A look at a directory. The caller gives fd (at its beginning), prefix_length (bytes of the full
 * names before the entries' own), large (bytes above which a file is NV_LARGE), look_at_all and the
 * memory, and zeroes the rest. */
struct nv_scan {
    int32_t fd;
    uint32_t prefix_length;
    int32_t look_at_all; /* put every entry into look, none into length */
    int32_t open_all;    /* open every regular file to see whether it can be read */
    uint64_t large;
    int64_t tick_ns;
    struct nv_entry *entries;
    uint32_t *look; /* indices of the entries the caller must decide about */
    uint32_t room;  /* of entries and look */
    uint32_t count;
    uint32_t looks;
    char *names;
    uint64_t names_room;
    uint64_t names_used;
    uint8_t *dents; /* aligned to 8 bytes */
    uint32_t dents_room;
    uint32_t dents_pos;
    uint32_t dents_end;
    uint64_t length;     /* bytes of the archive for the entries that are not in look */
    const char *culprit; /* after an error about a name: that name, good until the next call */
};

/* Why nv_gather came back. */
enum nv_stop {
    NV_STOP_END = 0,    /* every entry is done */
    NV_STOP_FULL = 1,   /* entries[next] does not fit; empty stage */
    NV_STOP_OPENED = 2, /* entries[next - 1] is NV_LARGE, has its header in stage, is open as fd */
    NV_STOP_OTHER = 3   /* entries[next] is NV_OTHER or NV_SHARED; the caller adds to next */
};

/* What a tree's directory has been seen to hold. */
struct nv_dir {
    const struct nv_entry *entries;
    const char *names;
    uint32_t count;
};

/* A directory that is being gathered. */
struct nv_frame {
    int32_t fd;
    uint32_t dir;           /* which of nv_gather.dirs */
    uint32_t next;          /* which entry comes next */
    uint32_t prefix_length; /* bytes of nv_gather.prefix that precede the names in it */
};

/* Members of a tree into memory. The caller gives everything but fd; of the frames the first, of
 * prefix what precedes the names in that. */
struct nv_gather {
    int32_t fd;                /* after NV_STOP_OPENED, the caller's */
    const struct nv_dir *dirs; /* in the order in which they are entered */
    uint32_t entered;          /* how many have been */
    uint32_t depth;            /* frames in use; the last is the directory we are in */
    struct nv_frame *frames;   /* room for the deepest directory */
    char *prefix;              /* room for the longest */
    const uint8_t *templates;  /* header blocks, in the order of enum nv_template */
    uint8_t *stage;
    uint64_t stage_size;
    uint64_t used;
    int64_t tick_ns;
};

/* Read a directory, look at every name in it, and sort by full name, a directory's with its slash.
 * Files that not everybody may read are opened once to see whether we may. Returns 0 when all of it
 * is there; after -NV_E_TICK, -NV_E_ROOM or EINTR the next call goes on. */
int nv_scan(struct nv_scan *s);

/* Put members into g->stage from g->used on, going into directories and out of them. The frames'
 * descriptors are closed on the way out, all but the first; where gathering is given up, by the
 * caller. Returns an enum nv_stop; -NV_E_TICK; or, with the last frame at the culprit and only
 * whole members in stage, -NV_E_SHORT, -NV_E_CHANGED, or what the system said. */
int nv_gather(struct nv_gather *g);

/* Open a directory or a regular file if it is still what was seen; of a directory only its identity
 * counts. Never follows a symbolic link. Returns the descriptor; -NV_E_SHORT, -NV_E_CHANGED. */
int nv_open_entry(int dir_fd, const char *name, const struct nv_entry *e);

/* Whether a name is still what was seen; the descriptor itself, where the name is empty. Returns 0,
 * -NV_E_SHORT or -NV_E_CHANGED. */
int nv_unchanged(int dir_fd, const char *name, const struct nv_entry *e);

#endif
