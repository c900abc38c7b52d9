/* Owns: the ready byte, and admission of the peer that sends it among strangers.
 * Knows nothing of: what follows the handshake. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "nv_handshake.h"
#include "nv_stream.h"
#include "nv_sys.h"

/* Outcome of looking at one pending connection. */
enum { SILENT, READY, REFUSED_READY, REFUSED_CLOSED };

/* The peer went away, or grants no room for even one byte: it is no guest. */
static int is_peers_fault(int64_t ret) {
    return ret == -EPIPE || ret == -ECONNRESET || ret == -ENOTCONN || ret == -EAGAIN;
}

/* Read the ready byte of a connection and answer it with as much of the opening as fits. */
static int look(struct nv_gate *g, int fd) {
    uint8_t byte = 0;
    int64_t ret = nv_sys_recv(fd, &byte, 1, MSG_DONTWAIT);

    if (ret == -EAGAIN || ret == -EINTR)
        return SILENT;
    if (ret <= 0)
        return REFUSED_CLOSED;
    if (byte != g->ready)
        return REFUSED_READY;
    do
        ret = nv_sys_send(fd, g->opening, (size_t)g->opening_length, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (ret == -EINTR);
    if (is_peers_fault(ret))
        return REFUSED_CLOSED;
    if (ret < 0)
        return (int)ret;
    g->opening_sent = (uint64_t)ret;
    return READY;
}

/* Take entry i out of pending[], keeping the order of arrival. */
static int take(struct nv_gate *g, uint32_t i) {
    int fd = g->pending[i];
    size_t after = g->npending - i - 1;

    memmove(&g->pending[i], &g->pending[i + 1], after * sizeof(g->pending[0]));
    memmove(&g->peers[i], &g->peers[i + 1], after * sizeof(g->peers[0]));
    g->npending--;
    return fd;
}

static void refuse(struct nv_gate *g, uint32_t i, uint32_t *counter) {
    (void)nv_sys_close(take(g, i));
    (*counter)++;
}

/* Look at pending connection i. Returns 1 when it was admitted and 0 when not; then it is still
 * there only if it keeps silent. */
static int examine(struct nv_gate *g, uint32_t i) {
    int found = look(g, g->pending[i]);

    if (found == SILENT)
        return 0;
    g->peer = g->peers[i];
    if (found == READY) {
        g->admitted_fd = take(g, i);
        g->admitted = 1;
        return 1;
    }
    refuse(g, i, found == REFUSED_READY ? &g->refused_ready : &g->refused_closed);
    g->talked = found < 0 || g->strict;
    if (found < 0)
        return found;
    return g->strict ? -NV_E_READY : 0;
}

/* Look at every pending connection. Returns 1 when one was admitted, 0 when none was. */
static int sift(struct nv_gate *g) {
    uint32_t i = 0;

    while (i < g->npending) {
        uint32_t before = g->npending;
        int ret = examine(g, i);

        if (ret != 0)
            return ret;
        if (g->npending == before)
            i++;
    }
    return 0;
}

/* Put a connection into pending[]. A guest speaks at once: where all keep silent, the one that has
 * done so longest makes room. Returns what sift does. */
static int keep(struct nv_gate *g, int fd, const struct nv_peer *peer) {
    int ret = 0;

    if (g->npending == NV_GATE_PENDING) {
        ret = sift(g);
        if (g->npending == NV_GATE_PENDING)
            refuse(g, 0, &g->refused_crowded);
    }
    g->pending[g->npending] = fd;
    g->peers[g->npending++] = *peer;
    return ret;
}

/* Move waiting connections from the backlog to pending[]; at most one full round, since a flood of
 * strangers must not keep the caller from its deadline. Returns 1 when one was admitted. */
static int take_in(struct nv_gate *g) {
    for (int round = 0; round < NV_GATE_PENDING; round++) {
        struct nv_peer peer;
        int32_t fd = -1;
        int ret = nv_accept(g->listen_fd, &peer, &fd);
        int found = 0;

        if (ret == -EAGAIN)
            return 0;
        if (ret == 0 && g->want_cid != NV_CID_ANY && peer.cid != g->want_cid) {
            (void)nv_sys_close(fd);
            g->refused_cid++;
            g->peer = peer;
            if (g->strict)
                return -NV_E_PEER;
            continue;
        }
        if (fd >= 0)
            found = keep(g, fd, &peer);
        if (found == 0 && ret == 0)
            found = examine(g, g->npending - 1); /* its byte may be there already */
        if (found != 0)
            return found;
        if (ret < 0)
            return ret;
    }
    return 0;
}

int nv_gate_admit(struct nv_gate *g, const struct nv_wait *w) {
    struct pollfd fds[NV_GUARDS + 1 + NV_GATE_PENDING];

    for (;;) {
        uint32_t i;
        int ret = nv_check(w);

        if (ret < 0)
            return ret;
        ret = take_in(g);
        if (ret == 0)
            ret = sift(g);
        if (ret != 0)
            return ret < 0 ? ret : 0;
        fds[NV_GUARDS] = (struct pollfd){.fd = g->listen_fd, .events = POLLIN};
        for (i = 0; i < g->npending; i++)
            fds[NV_GUARDS + 1 + i] = (struct pollfd){.fd = g->pending[i], .events = POLLIN};
        ret = nv_wait_any(fds, NV_GUARDS + 1 + g->npending, w);
        if (ret < 0)
            return ret;
    }
}

void nv_gate_close(struct nv_gate *g) {
    while (g->npending > 0)
        (void)nv_sys_close(take(g, g->npending - 1));
    if (g->admitted) {
        g->admitted = 0;
        (void)nv_sys_close(g->admitted_fd);
    }
}

int nv_handshake(int fd, uint8_t ready, const struct nv_wait *w, uint64_t *sent) {
    struct nv_xfer x = {.done = *sent};
    uint64_t got = 0;
    uint8_t byte = 0;
    int ret = nv_send(fd, &ready, 1, w, &x);

    *sent = x.done;
    if (ret < 0)
        return ret;
    ret = nv_recv(fd, &byte, 1, w, &got);
    if (ret < 0)
        return ret;
    if (got == 0)
        return -NV_E_SHORT;
    return byte == ready ? 0 : -NV_E_READY;
}
