/* Owns: sockets before any byte flows: listen, connect, accept, peer identity, buffer size.
 * Knows nothing of: what is said over them. */
#ifndef NV_SOCKET_H
#define NV_SOCKET_H

#include <stdint.h>

#include "nv_wait.h"

/* Who is at the other end. AF_VSOCK fills cid and port, AF_UNIX pid, uid and gid; what does not
 * apply is 0. */
struct nv_peer {
    int32_t family;
    uint32_t cid;
    uint32_t port;
    int32_t pid;
    uint32_t uid;
    uint32_t gid;
};

/* Listening AF_VSOCK socket, non-blocking and close-on-exec. Returns the descriptor. */
int nv_listen_vsock(uint32_t cid, uint32_t port, int backlog);

/* Listening AF_UNIX stream socket at path (length bytes, at most 107; no trailing NUL needed).
 * Returns the descriptor; the caller unlinks the path. An error leaves none behind. */
int nv_listen_unix(const char *path, uint32_t length, int backlog);

/* Connect to an AF_VSOCK address or a Unix path. *fd_out receives the descriptor as soon as it
 * exists and is the caller's, also after an error; it must be -1 on the first call, and a call that
 * returned NV_E_TICK or EINTR is repeated with the same *fd_out. Returns 0. */
int nv_connect_vsock(uint32_t cid, uint32_t port, const struct nv_wait *w, int32_t *fd_out);
int nv_connect_unix(const char *path, uint32_t length, const struct nv_wait *w, int32_t *fd_out);

/* Accept a connection that is already there, and say who it is. *fd_out receives the descriptor as
 * soon as it exists and is the caller's, also after an error. Returns 0, or -EAGAIN where none
 * waits. */
int nv_accept(int listen_fd, struct nv_peer *peer, int32_t *fd_out);

/* Enlarge SO_SNDBUF to want bytes or as near as the kernel allows; *got receives what it reports
 * afterwards. Returns 0. */
int nv_enlarge_sndbuf(int fd, int want, int32_t *got);

/* Let sends wait in the kernel, for usec at most each, before they say that the socket is full.
 * Receives do not wait all the same. Returns 0. */
int nv_block_briefly(int fd, int usec);

#endif
