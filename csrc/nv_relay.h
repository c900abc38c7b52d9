/* Owns: moving bytes between pairs of sockets for as long as nobody is needed.
 * Knows nothing of: frames, who is at either end, why a flow ends. */
#ifndef NV_RELAY_H
#define NV_RELAY_H

#include <poll.h>
#include <stdint.h>

#include "nv_wait.h"

/* How a flow stands. */
enum nv_flow_state {
    NV_FLOW_OPEN = 0,
    NV_FLOW_ENDED = 1, /* from has ended, everything is delivered, to is shut down for writing */
    NV_FLOW_FROM_FAILED = 2,
    NV_FLOW_TO_FAILED = 3
};

/* Bytes on their way from one non-blocking socket to another, in order and unchanged. The caller
 * gives from, to, buf and, where the sockets may be spliced, a pipe that nobody else uses; -1 where
 * not. The rest starts as 0. What was taken from one socket and did not fit the other stays in buf
 * or in the pipe.
 *
 * With record_most, bytes come as records: a big-endian u32 and so many bytes, record_most at most,
 * which is EMSGSIZE otherwise. What is sent at once is whole records then, where the socket takes
 * them; buf must hold one, and a pipe is not used. */
struct nv_flow {
    int32_t from;
    int32_t to;
    int32_t pipe_in;  /* end that is written to; set to -1 when the kernel refuses to splice */
    int32_t pipe_out; /* end that is read from */
    uint8_t *buf;
    uint64_t size;
    uint64_t pos;
    uint64_t end;
    uint64_t piped; /* bytes in the pipe */
    uint64_t moved; /* bytes the other socket took */
    int32_t bulk;   /* 1: as much as the buffer holds came at once; splice while much comes */
    int32_t state;  /* enum nv_flow_state */
    int32_t error;  /* positive errno value of a failed flow */
    uint32_t record_most;
    uint64_t whole; /* up to here buf holds whole records */
    uint64_t cut;   /* up to here they are being sent */
};

/* Keep flows flowing until there is something to do for the caller. fds has room for NV_GUARDS +
 * nwatch + nflows entries; the caller fills in those from NV_GUARDS on, nwatch of them. Raises no
 * SIGPIPE and leaves the signal mask as it was. Returns 0 when a watched entry has an event or a
 * flow is not open any more, or what nv_wait_any returns; -NV_E_TICK also after 50 ms in which
 * bytes moved, since a signal that interrupts nothing must not wait. Without an event it makes no
 * system call. */
int nv_relay(struct nv_flow *const *flows, uint32_t nflows, struct pollfd *fds, uint32_t nwatch,
             const struct nv_wait *w);

#endif
