/* Owns: moving bytes through a connected socket, and exact progress.
 * Knows nothing of: frames, addresses, who chose the way. */
#ifndef NV_STREAM_H
#define NV_STREAM_H

#include <stdint.h>

#include "nv_wait.h"

/* How payload leaves a descriptor. */
enum nv_strategy {
    NV_SENDFILE = 1, /* regular files: the kernel moves pages */
    NV_SPLICE = 2,   /* pipes */
    NV_MMAP = 3,     /* regular files through a mapping, one window at a time */
    NV_READ = 4      /* anything readable, through the staging buffer */
};

/* A run of payload behind a descriptor. offset is used where the descriptor can seek, and the
 * descriptor's own position is then left alone. stage is NULL, until a call answers NV_E_STAGE, or
 * page-aligned memory of stage_size bytes (a multiple of 64 KiB); stage_pos and stage_end must
 * start as 0 and keep what was read from a descriptor that cannot seek but not sent yet. */
struct nv_source {
    int32_t fd;
    int32_t strategy; /* enum nv_strategy; set to NV_READ when the kernel refuses it */
    int32_t seekable;
    uint64_t offset;
    uint64_t length;
    uint8_t *stage;
    uint64_t stage_size;
    uint64_t stage_pos;
    uint64_t stage_end;
};

/* How far a transfer got: exact after every return, error or not. */
struct nv_xfer {
    uint64_t done;       /* bytes the socket took */
    uint64_t calls;      /* system calls that moved bytes or tried to */
    int32_t from_source; /* 1: the error returned is the source's, not the socket's */
};

/* Send buf from x->done to length. Returns 0 when all of it is in the socket. */
int nv_send(int fd, const uint8_t *buf, uint64_t length, const struct nv_wait *w,
            struct nv_xfer *x);

/* Send s->length bytes from s->fd, from x->done on. Falls back to NV_READ at the same offset where
 * the kernel refuses the strategy. Raises no SIGPIPE and leaves the signal mask as it was. Returns
 * 0 when all of it is in the socket. */
int nv_send_from(int fd, struct nv_source *s, const struct nv_wait *w, struct nv_xfer *x);

/* Receive between 1 and length bytes with one recv. *got receives the count, 0 at end of stream.
 * Returns 0. */
int nv_recv(int fd, uint8_t *buf, uint64_t length, const struct nv_wait *w, uint64_t *got);

/* Send what a socket takes at once, also one that blocks. Raises no SIGPIPE. Returns the bytes it
 * took, or -EAGAIN. */
int64_t nv_send_now(int fd, const uint8_t *buf, uint64_t length);

/* Receive what has come, also from a socket that blocks. Returns the bytes, 0 at end of stream, or
 * -EAGAIN. */
int64_t nv_recv_now(int fd, uint8_t *buf, uint64_t length);

/* Look at a descriptor without waiting. Returns its poll events, 0 where none of those asked for is
 * there. */
int nv_poll_now(int fd, int events);

#endif
