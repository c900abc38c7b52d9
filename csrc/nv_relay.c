/* Owns: moving bytes between pairs of sockets for as long as nobody is needed.
 * Knows nothing of: frames, who is at either end, why a flow ends. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "nv_relay.h"
#include "nv_sigpipe.h"
#include "nv_sys.h"

/* Most of one splice; no pipe holds more. */
#define PIPE_MOST (1u << 20)

/* Fewer bytes than this at once are cheaper to copy than to splice. */
#define BULK_LEAST 16384u

/* Steps of one flow before the others and the watched descriptors are looked at. */
#define ROUNDS 8

/* After bytes have moved, their answer is often near: it is looked for this long before the thread
 * sleeps, since being woken takes longer than most answers. A stream one way has none: there the
 * thread sleeps at once, and finds more together. */
#define SPIN_NS 50000

/* Looks at the flows alone, while spinning, before everything else is looked at too. */
#define LOOKS 8

/* Most that whole records are sent together: a Unix socket takes it as one piece, or not at all. */
#define RECORDS_MOST 32768u

/* Longest that a call stays busy: a signal that interrupts no system call would wait otherwise. */
#define BUSY_NS 50000000

static int fail(struct nv_flow *f, int state, int64_t ret) {
    f->state = state;
    f->error = (int32_t)-ret;
    return -1;
}

/* Up to where the buffer may be sent. */
static uint64_t sendable(const struct nv_flow *f) {
    return f->record_most ? f->whole : f->end;
}

static int is_held(const struct nv_flow *f) {
    return f->pos < sendable(f) || f->piped > 0;
}

/* The length of a record, its four bytes included. */
static uint64_t record_length(const uint8_t *p) {
    return 4 + ((uint64_t)p[0] << 24 | (uint64_t)p[1] << 16 | (uint64_t)p[2] << 8 | p[3]);
}

/* See how far the buffer holds whole records. One that is too long ends the flow, once those before
 * it are delivered. Returns whether there are any, or -1. */
static int find_whole(struct nv_flow *f) {
    while (f->end - f->whole >= 4) {
        uint64_t length = record_length(f->buf + f->whole);

        if (length > 4 + (uint64_t)f->record_most) {
            f->error = EMSGSIZE;
            return f->whole > f->pos ? 1 : fail(f, NV_FLOW_FROM_FAILED, -EMSGSIZE);
        }
        if (f->end - f->whole < length)
            break;
        f->whole += length;
    }
    return f->whole > f->pos;
}

/* Nothing is held but the beginning of a record: put it where there is room for the rest. */
static void make_room(struct nv_flow *f) {
    uint64_t sent = sendable(f);

    f->end -= sent;
    memmove(f->buf, f->buf + sent, (size_t)f->end);
    f->pos = f->whole = f->cut = 0;
}

/* Up to where to send at once: what was begun, else as many records as make one piece. */
static uint64_t cut(struct nv_flow *f) {
    if (!f->record_most)
        return f->end;
    if (f->cut <= f->pos) {
        f->cut = f->pos;
        do
            f->cut += record_length(f->buf + f->cut);
        while (f->cut < f->whole &&
               f->cut + record_length(f->buf + f->cut) - f->pos <= RECORDS_MOST);
    }
    return f->cut;
}

static int is_refusal(int64_t ret) {
    return ret == -EINVAL || ret == -ENOSYS || ret == -EOPNOTSUPP;
}

/* The socket cannot be spliced to: take back what is in the pipe, as much as fits. */
static int64_t unpipe(struct nv_flow *f) {
    int64_t ret =
        nv_sys_read(f->pipe_out, f->buf, (size_t)(f->piped < f->size ? f->piped : f->size));

    f->pipe_in = -1;
    if (ret > 0) {
        f->pos = 0;
        f->end = (uint64_t)ret;
        f->piped -= (uint64_t)ret;
    }
    return ret;
}

/* Deliver what is held. Returns 1 when bytes moved, 0 when the socket is full, -1 when the flow
 * failed, -EINTR. */
static int deliver(struct nv_flow *f) {
    int64_t ret;

    if (f->pos == sendable(f) && f->piped > 0) {
        ret =
            nv_sys_splice(f->pipe_out, f->to, (size_t)f->piped, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (ret > 0)
            f->piped -= (uint64_t)ret;
        else if (is_refusal(ret)) {
            ret = unpipe(f);
            if (ret > 0)
                return deliver(f);
        }
    } else {
        ret = nv_sys_send(f->to, f->buf + f->pos, (size_t)(cut(f) - f->pos),
                          MSG_DONTWAIT | MSG_NOSIGNAL);
        if (ret > 0)
            f->pos += (uint64_t)ret;
    }
    if (ret == -EAGAIN)
        return 0;
    if (ret == -EINTR)
        return -EINTR;
    if (ret <= 0) /* 0: the pipe lacks what it was given */
        return fail(f, NV_FLOW_TO_FAILED, ret < 0 ? ret : -EIO);
    f->moved += (uint64_t)ret;
    return 1;
}

/* from has ended and nothing is held. */
static int finish(struct nv_flow *f) {
    int ret = nv_sys_shutdown(f->to, SHUT_WR);

    if (ret < 0 && ret != -ENOTCONN)
        return fail(f, NV_FLOW_TO_FAILED, ret);
    f->state = NV_FLOW_ENDED;
    return -1;
}

/* Take more. Returns 1 when there is something to deliver, 0 when there is nothing to take now, -1
 * when the flow is not open any more, -EINTR. */
static int take(struct nv_flow *f) {
    int spliced = f->bulk && f->pipe_in >= 0;
    int64_t ret;

    if (spliced) {
        ret = nv_sys_splice(f->from, f->pipe_in, PIPE_MOST, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    } else {
        make_room(f);
        ret = nv_sys_recv(f->from, f->buf + f->end, (size_t)(f->size - f->end), MSG_DONTWAIT);
    }
    if (spliced && is_refusal(ret)) {
        f->pipe_in = -1;
        return take(f);
    }
    if (ret == -EAGAIN)
        return 0;
    if (ret == -EINTR)
        return -EINTR;
    if (ret < 0)
        return fail(f, NV_FLOW_FROM_FAILED, ret);
    if (ret == 0 && (spliced || f->end == 0))
        return finish(f);
    if (ret == 0) { /* it ended within a record, whose beginning goes out all the same */
        f->whole = f->cut = f->end;
        return 1;
    }
    if (spliced) {
        f->piped = (uint64_t)ret;
        f->bulk = ret >= BULK_LEAST;
        return 1;
    }
    f->end += (uint64_t)ret;
    f->bulk = f->record_most ? ret >= BULK_LEAST : f->end == f->size;
    return f->record_most ? find_whole(f) : 1;
}

/* Returns 1 when bytes moved, 0 when none did, -1 when the flow is not open any more, -EINTR. */
static int run(struct nv_flow *f) {
    uint64_t before = f->moved;
    int ret = 0;

    for (int round = 0; round < ROUNDS; round++) {
        ret = is_held(f) ? 1 : take(f);
        if (ret > 0)
            ret = deliver(f);
        if (ret > 0 && f->error && !is_held(f))
            ret = fail(f, NV_FLOW_FROM_FAILED, -f->error);
        if (ret <= 0)
            break;
        /* Whoever sends little waits for an answer: look at the other flows first. */
        if (!f->bulk && !is_held(f))
            break;
    }
    /* What poll calls readable and splice does not must be received, or it would be polled again
     * and again. */
    if (ret == 0 && f->moved == before && !is_held(f))
        f->bulk = 0;
    return ret < 0 ? ret : f->moved > before;
}

/* What a relay call is doing. */
struct relay {
    struct nv_flow *const *flows;
    uint32_t nflows;
    uint32_t nwatch;
    struct pollfd *fds;
    const struct nv_wait *w;
};

/* Wait for events of anything, or only look. Returns what nv_wait_any returns. */
static int look(const struct relay *r, int only_look) {
    struct pollfd *ours = r->fds + NV_GUARDS + r->nwatch;
    struct nv_wait until = *r->w;

    for (uint32_t i = 0; i < r->nflows; i++) {
        const struct nv_flow *f = r->flows[i];
        int held = is_held(f);

        ours[i].fd = f->state != NV_FLOW_OPEN ? -1 : held ? f->to : f->from;
        ours[i].events = held ? POLLOUT : POLLIN;
        ours[i].revents = 0;
    }
    if (only_look)
        until.tick_ns = 0;
    return nv_wait_any(r->fds, NV_GUARDS + r->nwatch + r->nflows, &until);
}

/* Returns what nv_relay does. While bytes move, the flows are tried without being polled, and
 * everything else is looked at in between; once nothing has moved for SPIN_NS, or in bulk, where
 * the others need the processor more and larger portions are better, the thread sleeps. */
static int relay(const struct relay *r) {
    struct pollfd *ours = r->fds + NV_GUARDS + r->nwatch;
    int64_t now = nv_sys_now_ns();
    int64_t leave = now + BUSY_NS;
    int64_t spin_until = 0;
    unsigned looks = LOOKS;
    uint32_t last = r->nflows; /* the flow whose bytes moved last */

    for (;;) {
        int spinning = now < spin_until;
        int looked = !spinning || ++looks >= LOOKS;
        int moved = 0;
        uint32_t i;
        int ret;

        if (looked) {
            int64_t before = now;

            looks = 0;
            ret = look(r, spinning);
            now = nv_sys_now_ns();
            if (ret < 0 && (ret != -NV_E_TICK || now >= r->w->tick_ns))
                return ret;
            if (now - before >= BUSY_NS) /* it slept */
                leave = now + BUSY_NS;
        }
        for (i = 0; i < r->nflows; i++) {
            struct nv_flow *f = r->flows[i];

            if (f->state != NV_FLOW_OPEN)
                continue;
            if (looked ? !ours[i].revents : is_held(f))
                continue;
            ret = run(f);
            if (ret > 0) {
                moved = 1;
                if (!f->bulk && i != last)
                    spin_until = now + SPIN_NS;
                last = i;
            }
            if (ret < 0)
                return f->state != NV_FLOW_OPEN ? 0 : ret;
        }
        if (looked)
            for (i = 0; i < r->nwatch; i++)
                if (r->fds[NV_GUARDS + i].revents)
                    return 0;
        if (!moved && spinning)
            nv_sys_yield();
        now = nv_sys_now_ns();
        if (now >= r->w->deadline_ns) /* what never waits must end in time too */
            return -NV_E_DEADLINE;
        if (now >= r->w->tick_ns || (now >= leave && (moved || now < spin_until)))
            return -NV_E_TICK;
    }
}

int nv_relay(struct nv_flow *const *flows, uint32_t nflows, struct pollfd *fds, uint32_t nwatch,
             const struct nv_wait *w) {
    const struct relay r = {flows, nflows, nwatch, fds, w};
    struct nv_sigpipe_guard guard;
    int ret;

    if (nflows == 0)
        return nv_wait_any(fds, NV_GUARDS + nwatch, w);
    ret = nv_sigpipe_block(&guard);
    if (ret < 0)
        return ret;
    ret = relay(&r);
    nv_sigpipe_restore(&guard);
    return ret;
}
