/*
 * Owns: the PCI device that the kernel's nitro_enclaves driver talks to, for testing launchers
 * without AWS: slots, memory, vCPUs, start, stop. Must not know what an image has in it: on start
 * it writes the image, as it lies in the memory that was handed over, to a file and runs a command;
 * when the command ends, the enclave is gone and the driver is told.
 *
 * -device
 * nitro-enclaves,dir=DIR[,command=SHELL][,regions=N][,fail-command=N,fail-errno=E[,fail-after=K]]
 * The command gets EIF, CID, DEBUG, MEMORY and VCPUS in its environment. Without one the enclave
 * runs until it is stopped. `regions` is how many memory regions an enclave may have. The three
 * `fail-` say that from the K-th on (0 is the first) command N of the driver is answered with errno
 * E. They can be changed while it runs: by QMP's qom-set, and from inside the parent by three
 * 32-bit registers at 0x800, 0x804 and 0x808 of BAR 3 (mapped from sysfs, with iomem=relaxed on the
 * kernel's command line); writing the first begins the count anew.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * This program is free software; you can redistribute it and/or modify it under the terms of the
 * GNU General Public License as published by the Free Software Foundation; either version 2 of the
 * License, or (at your option) any later version. It is built into QEMU and into nothing else of
 * this project.
 */
#include "exec/cpu-common.h"
#include "hw/pci/msix.h"
#include "hw/pci/pci_device.h"
#include "hw/qdev-properties.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/module.h"
#include "qemu/osdep.h"
#include "system/dma.h"

#define TYPE_NE "nitro-enclaves"
OBJECT_DECLARE_SIMPLE_TYPE(NeState, NE)

enum { ENABLE = 0, VERSION = 2, COMMAND = 4, EVTCNT = 12, SEND = 0x10, RECV = 0x100, DATA = 240 };
enum {
    ENCLAVE_START = 1,
    ENCLAVE_GET_SLOT,
    ENCLAVE_STOP,
    SLOT_ALLOC,
    SLOT_FREE,
    SLOT_ADD_MEM,
    SLOT_ADD_VCPU,
    SLOT_COUNT,
    NEXT_SLOT,
    SLOT_INFO,
    SLOT_ADD_BULK_VCPUS
};
enum {
    FAIL_COMMAND = 0x800,
    FAIL_ERRNO = 0x804,
    FAIL_AFTER = 0x808
}; /* ours; a real device has nothing there */
enum { RUNNING = 2, STOPPED = 0xffff, SLOTS = 4, REGIONS = 1024 };

typedef struct {
    uint64_t uid, cid, flags, mem, vcpus, regions;
    uint16_t state;
    GPid child;
    struct {
        uint64_t at, size;
    } region[REGIONS];
    NeState *device;
} Slot;

struct NeState {
    PCIDevice parent;
    MemoryRegion bar;
    uint8_t enable, send[DATA], recv[DATA];
    uint16_t version, replies, events;
    uint64_t next_uid;
    uint32_t next_cid, max_regions, fail_command, fail_errno, fail_after, seen;
    char *dir, *command;
    Slot slot[SLOTS];
};

struct QEMU_PACKED reply {
    int32_t rc;
    uint32_t pad;
    uint64_t slot_uid, cid, slot_count, mem_regions, mem_size, vcpus, flags;
    uint16_t state;
    uint8_t pad1[6];
};

static Slot *find(NeState *s, uint64_t uid) {
    for (int i = 0; i < SLOTS; i++) {
        if (s->slot[i].uid == uid && uid) {
            return &s->slot[i];
        }
    }
    return NULL;
}

static void tell(NeState *s) {
    s->events++;
    msix_notify(&s->parent, 1);
}

static void child_ended(GPid pid, int status, void *opaque) {
    Slot *slot = opaque;
    g_spawn_close_pid(pid);
    if (slot->child == pid) {
        slot->child = 0;
        slot->state = STOPPED;
        tell(slot->device);
    }
}

static bool take(NeState *s, Slot *slot, uint64_t offset, void *to, uint64_t size) {
    for (uint64_t i = 0; size && i < slot->regions; i++) {
        uint64_t have = slot->region[i].size;
        if (offset >= have) {
            offset -= have;
            continue;
        }
        uint64_t part = MIN(size, have - offset);
        cpu_physical_memory_read(slot->region[i].at + offset, to, part);
        to = (char *)to + part;
        size -= part;
        offset = 0;
    }
    return !size;
}

static bool save_image(NeState *s, Slot *slot, const char *path) {
    enum { AT = 8 << 20, HEADER = 548 };
    uint8_t head[HEADER];
    uint64_t size = HEADER;
    if (!take(s, slot, AT, head, HEADER) || memcmp(head, ".eif", 4)) {
        return false;
    }
    for (int i = 0, n = lduw_be_p(head + 26); i < n && i < 32; i++) {
        size = MAX(size, ldq_be_p(head + 28 + 8 * i) + 12 + ldq_be_p(head + 284 + 8 * i));
    }
    if (size > slot->mem) {
        return false;
    }
    g_autofree char *image = g_malloc(size);
    return take(s, slot, AT, image, size) && g_file_set_contents(path, image, size, NULL);
}

static int32_t start(NeState *s, Slot *slot, uint64_t cid, uint64_t flags) {
    g_autofree char *path = g_strdup_printf("%s/enclave-%" PRIu64 ".eif", s->dir, slot->uid);
    if (!save_image(s, slot, path)) {
        return -EINVAL;
    }
    slot->cid = cid ? cid : s->next_cid++;
    slot->flags = flags;
    slot->state = RUNNING;
    if (s->command) {
        char *argv[] = {(char *)"/bin/sh", (char *)"-c", s->command, NULL};
        g_auto(GStrv) env = g_get_environ();
        g_autofree char *c = g_strdup_printf("%" PRIu64, slot->cid),
                        *m = g_strdup_printf("%" PRIu64, slot->mem),
                        *v = g_strdup_printf("%" PRIu64, slot->vcpus);
        env = g_environ_setenv(env, "EIF", path, true);
        env = g_environ_setenv(env, "CID", c, true);
        env = g_environ_setenv(env, "MEMORY", m, true);
        env = g_environ_setenv(env, "VCPUS", v, true);
        env = g_environ_setenv(env, "DEBUG", flags & 1 ? "1" : "0", true);
        if (!g_spawn_async(s->dir, argv, env, G_SPAWN_DO_NOT_REAP_CHILD, NULL, NULL, &slot->child,
                           NULL)) {
            return -EIO;
        }
        g_child_watch_add(slot->child, child_ended, slot);
    }
    return 0;
}

static void stop(Slot *slot) {
    if (slot->child) {
        kill(slot->child, SIGTERM);
        slot->child = 0;
    }
    slot->state = STOPPED;
}

static void obey(NeState *s, uint32_t command) {
    struct reply r = {0};
    uint64_t uid = ldq_le_p(s->send), a = ldq_le_p(s->send + 8), b = ldq_le_p(s->send + 16);
    Slot *slot = find(s, uid);
    r.slot_uid = uid;
    if (command == s->fail_command && s->seen++ >= s->fail_after) {
        r.rc = -(int32_t)s->fail_errno;
        memcpy(s->recv, &r, sizeof r);
        s->replies++;
        msix_notify(&s->parent, 0);
        return;
    }
    switch (command) {
    case SLOT_ALLOC:
        slot = NULL;
        for (int i = 0; i < SLOTS && !slot; i++) {
            slot = s->slot[i].uid ? NULL : &s->slot[i];
        }
        if (!slot) {
            r.rc = -ENOSPC;
            break;
        }
        memset(slot, 0, sizeof *slot);
        slot->device = s;
        r.slot_uid = slot->uid = ++s->next_uid;
        r.mem_regions = s->max_regions;
        break;
    case SLOT_COUNT:
        for (int i = 0; i < SLOTS; i++) {
            r.slot_count += !!s->slot[i].uid;
        }
        break;
    default:
        if (!slot) {
            r.rc = -ENOENT;
            break;
        }
        switch (command) {
        case SLOT_ADD_MEM:
            if (slot->regions == MIN(s->max_regions, REGIONS)) {
                r.rc = -ENOSPC;
                break;
            }
            slot->region[slot->regions].at = a;
            slot->region[slot->regions++].size = b;
            slot->mem += b;
            break;
        case SLOT_ADD_VCPU:
            slot->vcpus++;
            break;
        case ENCLAVE_START:
            r.rc = start(s, slot, a, b);
            r.cid = slot->cid;
            break;
        case ENCLAVE_STOP:
            stop(slot);
            break;
        case SLOT_FREE:
            stop(slot);
            slot->uid = 0;
            break;
        case SLOT_INFO:
            r.cid = slot->cid;
            r.mem_regions = slot->regions;
            r.mem_size = slot->mem;
            r.vcpus = slot->vcpus;
            r.flags = slot->flags;
            r.state = slot->state;
            break;
        default:
            r.rc = -EINVAL;
        }
    }
    memcpy(s->recv, &r, sizeof r); /* little-endian hosts only */
    s->replies++;
    msix_notify(&s->parent, 0);
}

static uint64_t bar_read(void *opaque, hwaddr at, unsigned size) {
    NeState *s = opaque;
    uint64_t value = 0;
    if (at == ENABLE) {
        return s->enable;
    } else if (at == VERSION) {
        return s->version;
    } else if (at == EVTCNT) {
        return (uint32_t)s->events << 16 | s->replies;
    } else if (at >= SEND && at + size <= SEND + DATA) {
        memcpy(&value, s->send + at - SEND, size);
    } else if (at >= RECV && at + size <= RECV + DATA) {
        memcpy(&value, s->recv + at - RECV, size);
    }
    return value;
}

static void bar_write(void *opaque, hwaddr at, uint64_t value, unsigned size) {
    NeState *s = opaque;
    if (at == ENABLE) {
        s->enable = value;
    } else if (at == VERSION) {
        s->version = value <= 1 ? value : 1;
    } else if (at == COMMAND) {
        obey(s, value);
    } else if (at == FAIL_COMMAND) {
        s->fail_command = value;
        s->seen = 0;
    } else if (at == FAIL_ERRNO) {
        s->fail_errno = value;
    } else if (at == FAIL_AFTER) {
        s->fail_after = value;
    } else if (at >= SEND && at + size <= SEND + DATA) {
        memcpy(s->send + at - SEND, &value, size);
    }
}

static const MemoryRegionOps bar_ops = {
    .read = bar_read,
    .write = bar_write,
    .endianness = DEVICE_LITTLE_ENDIAN,
    .valid = {.min_access_size = 1, .max_access_size = 8},
    .impl = {.min_access_size = 1, .max_access_size = 8},
};

static void realize(PCIDevice *pci, Error **errp) {
    NeState *s = NE(pci);
    s->next_cid = 16;
    if (!s->dir) {
        error_setg(errp, "dir= says where the images go");
        return;
    }
    memory_region_init_io(&s->bar, OBJECT(s), &bar_ops, s, TYPE_NE, 4096);
    pci_register_bar(pci, 3, PCI_BASE_ADDRESS_SPACE_MEMORY, &s->bar);
    if (msix_init_exclusive_bar(pci, 2, 4, errp)) {
        return;
    }
    msix_vector_use(pci, 0);
    msix_vector_use(pci, 1);
}

static void unrealize(PCIDevice *pci) {
    NeState *s = NE(pci);
    for (int i = 0; i < SLOTS; i++) {
        stop(&s->slot[i]);
    }
    msix_uninit_exclusive_bar(pci);
}

static const Property properties[] = {
    DEFINE_PROP_STRING("dir", NeState, dir),
    DEFINE_PROP_STRING("command", NeState, command),
    DEFINE_PROP_UINT32("regions", NeState, max_regions, 64),
};

static void class_init(ObjectClass *class, void *data) {
    PCIDeviceClass *pci = PCI_DEVICE_CLASS(class);
    pci->realize = realize;
    pci->exit = unrealize;
    pci->vendor_id = 0x1d0f;
    pci->device_id = 0xe4c1;
    pci->class_id = PCI_CLASS_OTHERS;
    DEVICE_CLASS(class)->desc = "Nitro Enclaves, the parent instance's side";
    device_class_set_props(DEVICE_CLASS(class), properties);
}

static void instance_init(Object *object) {
    NeState *s = NE(object);
    object_property_add_uint32_ptr(object, "fail-command", &s->fail_command,
                                   OBJ_PROP_FLAG_READWRITE);
    object_property_add_uint32_ptr(object, "fail-errno", &s->fail_errno, OBJ_PROP_FLAG_READWRITE);
    object_property_add_uint32_ptr(object, "fail-after", &s->fail_after, OBJ_PROP_FLAG_READWRITE);
}

static const TypeInfo info = {
    .name = TYPE_NE,
    .parent = TYPE_PCI_DEVICE,
    .instance_size = sizeof(NeState),
    .instance_init = instance_init,
    .class_init = class_init,
    .interfaces = (InterfaceInfo[]){{INTERFACE_CONVENTIONAL_PCI_DEVICE}, {}},
};

static void register_types(void) {
    type_register_static(&info);
}
type_init(register_types)
