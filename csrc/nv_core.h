/* Owns: the whole C API, one contract comment per function.
 * Must not know: Python, frame ids, what the bytes mean. */
#ifndef NV_CORE_H
#define NV_CORE_H

#include <errno.h>
#include <poll.h>
#include <stdint.h>

/* Every function returns >= 0, or a negative errno value. Nine values never come from the system
 * calls used here and carry a meaning of our own: */
#define NV_E_TICK EAGAIN         /* wait.tick_ns has passed; nothing failed, call again */
#define NV_E_DEADLINE ETIME      /* wait.deadline_ns has passed */
#define NV_E_CANCELLED ECANCELED /* wait.cancel_fd became readable */
#define NV_E_DIED EOWNERDEAD     /* wait.watch_fd hung up */
#define NV_E_SHORT ENODATA       /* the source ended before its declared length */
#define NV_E_PEER EREMCHG        /* strict gate: a peer with another CID connected */
#define NV_E_READY EBADMSG       /* the peer's first byte is not the ready byte */
#define NV_E_ROOM ENOSR          /* the caller's memory is full; give more and call again */
#define NV_E_CHANGED ENOTUNIQ    /* what has this name now is not what was seen before */
#define NV_E_STAGE EXFULL        /* nv_source.stage is needed after all; set it and call again */

#define NV_CID_ANY 0xffffffffu /* nv_gate.want_cid: admit any peer */
#define NV_GUARDS 2            /* entries of a poll that waiting keeps for itself */
#define NV_GATE_PENDING 64     /* connections a gate keeps waiting for their ready byte */

/* When a call must give up. Times are absolute CLOCK_MONOTONIC nanoseconds. tick_ns bounds how long
 * C stays away from its caller, so that signal handlers and progress reports run. A descriptor of
 * -1 is not watched. */
struct nv_wait {
    int64_t deadline_ns;
    int64_t tick_ns;
    int32_t cancel_fd;
    int32_t watch_fd;
};

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

/* Blocks of nv_gather.templates. */
enum nv_template {
    NV_TEMPLATE_FILE = 0,
    NV_TEMPLATE_DIRECTORY = 1,
    NV_TEMPLATE_SYMLINK = 2,
    NV_TEMPLATE_LONG_NAME = 3
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

/* nv_listen.c */

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

/* nv_handshake.c */

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

/* nv_stream.c */

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

/* nv_relay.c */

/* Keep flows flowing until there is something to do for the caller. fds has room for NV_GUARDS +
 * nwatch + nflows entries; the caller fills in those from NV_GUARDS on, nwatch of them. Raises no
 * SIGPIPE and leaves the signal mask as it was. Returns 0 when a watched entry has an event or a
 * flow is not open any more, or what nv_wait_any returns; -NV_E_TICK also after 50 ms in which
 * bytes moved, since a signal that interrupts nothing must not wait. Without an event it makes no
 * system call. */
int nv_relay(struct nv_flow *const *flows, uint32_t nflows, struct pollfd *fds, uint32_t nwatch,
             const struct nv_wait *w);

/* nv_tree.c */

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

/* nv_tar.c */

/* Make every name with this hash, and what lies below one, come back to the caller. */
void nv_tar_note(uint8_t *filter, const char *name, uint64_t length);

/* Run over members that are files or directories and have nothing unusual, from t->at on; t->at is
 * then the first header that was left to the caller. With renames all headers run over lie in one
 * window, which has them as they must be. A window that is there and has the first header is not
 * read again. Returns 0; -NV_E_TICK, or what the system said: what was run over counts. */
int nv_tar_run(struct nv_tar *t);

/* nv_wait.c: for the other files of this folder only */

/* Wait until one of fds[NV_GUARDS..count) has an event; the first NV_GUARDS entries are filled in
 * here. Returns 0 with revents set, or -NV_E_CANCELLED, -NV_E_DIED, -NV_E_DEADLINE, -NV_E_TICK in
 * this order of precedence. */
int nv_wait_any(struct pollfd *fds, nfds_t count, const struct nv_wait *w);

/* The same for one descriptor. */
int nv_wait_fd(int fd, short events, const struct nv_wait *w);

/* The same verdicts without waiting: 0, or why the caller must stop now. The two guards are looked
 * at once a tick only, so the call is cheap enough for every iteration. */
int nv_check(const struct nv_wait *w);

#endif
