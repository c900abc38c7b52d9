/* Owns: the whole C API, for whoever builds the compiled module.
 * Knows nothing of: what is in it; each header has the contracts of its C file. */
#ifndef NV_CORE_H
#define NV_CORE_H

#include "nv_handshake.h"
#include "nv_relay.h"
#include "nv_socket.h"
#include "nv_stream.h"
#include "nv_tar.h"
#include "nv_tree.h"
#include "nv_wait.h"

#endif
