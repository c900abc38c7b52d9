/* Owns: moving bytes between pairs of sockets for as long as nobody is needed.
 * Must not know: frames, who is at either end, why a flow ends. */
#include "nv_core.h"
#include "nv_sigpipe.h"
#include "nv_sys.h"

/* Most of one splice; no pipe holds more. */
#define PIPE_MOST (1u << 20)

/* Fewer bytes than this at once are cheaper to copy than to splice. */
#define BULK_LEAST 16384u

/* Steps of one flow before the others and the watched descriptors are looked at. */
#define ROUNDS 8

/* After bytes have moved, their answer is often near: it is looked for this long before the thread
 * sleeps, since being woken takes longer than most answers. */
#define SPIN_NS 50000

static int fail(struct nv_flow *f, int state, int64_t ret) {
    f->state = state;
    f->error = (int32_t)-ret;
    return -1;
}

static int is_held(const struct nv_flow *f) {
    return f->pos < f->end || f->piped > 0;
}

/* Deliver what is held. Returns 1 when bytes moved, 0 when the socket is full, -1 when the flow
 * failed. */
static int deliver(struct nv_flow *f) {
    int64_t ret;

    f->calls++;
    if (f->pos < f->end)
        ret = nv_sys_send(f->to, f->buf + f->pos, (size_t)(f->end - f->pos),
                          MSG_DONTWAIT | MSG_NOSIGNAL);
    else
        ret =
            nv_sys_splice(f->pipe_out, f->to, (size_t)f->piped, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (ret == -EAGAIN || ret == -EINTR)
        return 0;
    if (ret < 0)
        return fail(f, NV_FLOW_TO_FAILED, ret);
    f->moved += (uint64_t)ret;
    if (f->pos < f->end)
        f->pos += (uint64_t)ret;
    else
        f->piped -= (uint64_t)ret;
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

static int is_refusal(int64_t ret) {
    return ret == -EINVAL || ret == -ENOSYS || ret == -EOPNOTSUPP;
}

/* Take more. Returns 1 when there is something to deliver, 0 when there is nothing to take now, -1
 * when the flow is not open any more. */
static int take(struct nv_flow *f) {
    int spliced = f->bulk && f->pipe_in >= 0;
    int64_t ret;

    f->calls++;
    if (spliced)
        ret = nv_sys_splice(f->from, f->pipe_in, PIPE_MOST, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    else
        ret = nv_sys_recv(f->from, f->buf, (size_t)f->size, MSG_DONTWAIT);
    if (spliced && is_refusal(ret)) {
        f->pipe_in = -1;
        return take(f);
    }
    if (ret == -EAGAIN || ret == -EINTR) {
        f->bulk = 0;
        return 0;
    }
    if (ret < 0)
        return fail(f, NV_FLOW_FROM_FAILED, ret);
    if (ret == 0)
        return finish(f);
    if (spliced) {
        f->piped = (uint64_t)ret;
        f->bulk = ret >= BULK_LEAST;
    } else {
        f->pos = 0;
        f->end = (uint64_t)ret;
        f->bulk = f->end == f->size;
    }
    return 1;
}

/* Returns 1 when bytes moved. */
static int run(struct nv_flow *f) {
    int moved = 0;

    for (int round = 0; round < ROUNDS; round++) {
        int ret = is_held(f) ? 1 : take(f);

        if (ret > 0)
            ret = deliver(f);
        if (ret <= 0)
            break;
        moved = 1;
        /* Whoever sends little waits for an answer: look at the other flows first. */
        if (!f->bulk && !is_held(f))
            break;
    }
    return moved;
}

static int64_t relay(struct nv_flow *const *flows, uint32_t nflows, struct pollfd *fds,
                     uint32_t nwatch, const struct nv_wait *w) {
    struct pollfd *ours = fds + NV_GUARDS + nwatch;
    struct nv_wait soon = *w;
    int64_t spin_until = 0;

    soon.tick_ns = 0;
    for (;;) {
        uint32_t i;
        int spinning = spin_until > 0;
        int ret;

        for (i = 0; i < nflows; i++) {
            const struct nv_flow *f = flows[i];
            int held = is_held(f);

            ours[i].fd = f->state != NV_FLOW_OPEN ? -1 : held ? f->to : f->from;
            ours[i].events = held ? POLLOUT : POLLIN;
            ours[i].revents = 0;
        }
        ret = nv_wait_any(fds, NV_GUARDS + nwatch + nflows, spinning ? &soon : w);
        if (ret == -NV_E_TICK && spinning) {
            int64_t now = nv_sys_now_ns();

            if (now >= w->tick_ns)
                return ret;
            if (now >= spin_until)
                spin_until = 0;
            else
                nv_sys_yield();
            continue;
        }
        if (ret < 0)
            return ret;
        for (i = 0; i < nflows; i++) {
            if (ours[i].fd < 0 || !ours[i].revents)
                continue;
            if (run(flows[i]))
                spin_until = nv_sys_now_ns() + SPIN_NS;
            if (flows[i]->state != NV_FLOW_OPEN)
                return 0;
        }
        for (i = 0; i < nwatch; i++)
            if (fds[NV_GUARDS + i].revents)
                return 0;
        ret = nv_check(w); /* what never waits must end in time too */
        if (ret < 0)
            return ret;
    }
}

int nv_relay(struct nv_flow *const *flows, uint32_t nflows, struct pollfd *fds, uint32_t nwatch,
             const struct nv_wait *w) {
    struct nv_sigpipe_guard guard;
    int64_t ret;

    if (nflows == 0)
        return nv_wait_any(fds, NV_GUARDS + nwatch, w);
    ret = nv_sigpipe_block(&guard);
    if (ret < 0)
        return (int)ret;
    ret = relay(flows, nflows, fds, nwatch, w);
    nv_sigpipe_restore(&guard);
    return (int)ret;
}
