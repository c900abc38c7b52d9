/* Owns: what the parts of the guest need of each other. Must not know anything of the package. */
#include <stdbool.h>
#include <stddef.h>

/* init.c: a line on the console; an end with a reason; a connection to port CID + offset or -1. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
int call_host(unsigned offset);
double now(void);

/* nsm.c: the security module. Without one every call does nothing. */
bool nsm_open(int (*await)(const char *path));
void nsm_extend(unsigned pcr, const void *data, size_t size);
void nsm_extend_pieces(unsigned pcr, const void *data,
                       size_t size); /* one request for each 2 KiB */
void nsm_lock(unsigned range);
void nsm_show(unsigned pcr);

/* network.c: tap0 joined to a connection; what is to be given to network_stop, or -1. */
int network_start(unsigned offset, bool v1_17);
void network_stop(int handle);
