/* Owns: the ready byte, and admission of the peer that sends it among strangers.
 * Knows nothing of: what follows the handshake. */
#ifndef NV_HANDSHAKE_H
#define NV_HANDSHAKE_H

#include <stdint.h>

#include "nv_socket.h"
#include "nv_wait.h"

#define NV_CID_ANY 0xffffffffu /* nv_gate.want_cid: admit any peer */
#define NV_GATE_PENDING 64     /* connections a gate keeps waiting for their ready byte */

/* Admission of the one peer that counts among any number of strangers. The caller sets listen_fd,
 * want_cid, strict, ready and the opening, zeroes the rest, and calls nv_gate_close in the end. The
 * struct owns pending[] and admitted_fd: a call that returns early loses nothing, the next one goes
 * on. */
struct nv_gate {
    int32_t listen_fd;
    uint32_t want_cid;
    int32_t strict;
    uint8_t ready;
    uint8_t admitted; /* 1: admitted_fd and peer are set, and the caller may take the descriptor */
    uint8_t talked;   /* 1: the error returned is a connection's, not the listening socket's */
    const uint8_t
        *opening; /* what answers the ready byte: that byte, and what may follow at once */
    uint64_t opening_length; /* at least 1 */
    uint64_t opening_sent;   /* how much of it the admitted peer's socket took, at least 1 */
    int32_t admitted_fd;
    struct nv_peer peer;      /* the admitted peer; after NV_E_PEER or NV_E_READY the refused one */
    uint32_t refused_cid;     /* closed: came from another CID */
    uint32_t refused_ready;   /* closed: first byte was not the ready byte */
    uint32_t refused_closed;  /* closed: went away before it was admitted */
    uint32_t refused_crowded; /* closed: the oldest silent one, when pending[] was full */
    uint32_t npending;
    int32_t pending[NV_GATE_PENDING];
    struct nv_peer peers[NV_GATE_PENDING];
};

/* Accept until one peer from want_cid sends the ready byte, and answer it with the opening, in one
 * send that does not wait. Strangers are closed and counted; with strict the first of them ends the
 * call with NV_E_PEER or NV_E_READY. Returns 0 with gate->admitted set. */
int nv_gate_admit(struct nv_gate *gate, const struct nv_wait *w);

/* Close every connection the gate still owns. The listening socket is not the gate's. */
void nv_gate_close(struct nv_gate *gate);

/* The connecting side: send the ready byte, then expect it back. *sent keeps the progress between
 * calls and starts as 0. Returns 0; NV_E_READY where another byte came, NV_E_SHORT where the peer
 * closed instead. */
int nv_handshake(int fd, uint8_t ready, const struct nv_wait *w, uint64_t *sent);

#endif
