/* Owns: the guest's network: the device tap0, its frames over a connection to the host, in a
 * process of its own. Must not know what is sent. */
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FRAME_HEADER = 14, TUN_MAJOR = 10, TUN_MINOR = 200 };
static const char ADDRESS[] = "172.31.10.83", NETMASK[] = "255.255.255.0";
static const unsigned char MAC[] = {0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee};

static void put(struct sockaddr *to, const char *address) {
    struct sockaddr_in in = {.sin_family = AF_INET};
    inet_pton(AF_INET, address, &in.sin_addr);
    memcpy(to, &in, sizeof in);
}

static void ask(int fd, unsigned long request, void *what, const char *name) {
    if (ioctl(fd, request, what) < 0)
        die("network: %s", name);
}

/* The device with its address, up, and the way to everywhere; its MTU. */
static int make_tap(int *tap) {
    struct ifreq device = {.ifr_flags = IFF_TAP | IFF_NO_PI}, what;
    mkdir("/dev/net", 0755);
    if (mknod("/dev/net/tun", S_IFCHR | 0666, makedev(TUN_MAJOR, TUN_MINOR)) < 0 && errno != EEXIST)
        die("network: mknod");
    if ((*tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC)) < 0)
        die("network: /dev/net/tun");
    strcpy(device.ifr_name, "tap0");
    ask(*tap, TUNSETIFF, &device, "TUNSETIFF");
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    what = (struct ifreq){0};
    strcpy(what.ifr_name, "tap0");
    put(&what.ifr_addr, ADDRESS);
    ask(fd, SIOCSIFADDR, &what, "address");
    put(&what.ifr_netmask, NETMASK);
    ask(fd, SIOCSIFNETMASK, &what, "netmask");
    what.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(what.ifr_hwaddr.sa_data, MAC, sizeof MAC);
    ask(fd, SIOCSIFHWADDR, &what, "MAC");
    ask(fd, SIOCGIFFLAGS, &what, "flags");
    what.ifr_flags |= IFF_UP | IFF_RUNNING;
    ask(fd, SIOCSIFFLAGS, &what, "up");
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = device.ifr_name};
    put(&route.rt_gateway, ADDRESS);
    put(&route.rt_dst, "0.0.0.0");
    put(&route.rt_genmask, "0.0.0.0");
    ask(fd, SIOCADDRT, &route, "route");
    ask(fd, SIOCGIFMTU, &what, "MTU");
    close(fd);
    return what.ifr_mtu;
}

static int whole(int fd, void *to, size_t size, int writes) {
    for (char *at = to; size;) {
        ssize_t n = writes ? write(fd, at, size) : read(fd, at, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

static void forward(int tap, int host, uint32_t most) {
    unsigned char *frame = malloc(most);
    struct pollfd watched[] = {{.fd = host, .events = POLLIN}, {.fd = tap, .events = POLLIN}};
    uint32_t size;
    while (frame && poll(watched, 2, -1) >= 0) {
        if (watched[0].revents) {
            if (whole(host, &size, sizeof size, 0) < 0)
                return;
            size = ntohl(size);
            if (size > most) {
                say("network: a frame of %u bytes, %u is the most", size, most);
                return;
            }
            if (whole(host, frame, size, 0) < 0)
                return;
            if (write(tap, frame, size) != (ssize_t)size) {
                say("network: the device took no frame of %u bytes: %s", size, strerror(errno));
                return;
            }
        }
        if (watched[1].revents) {
            ssize_t n = read(tap, frame, most);
            if (n <= 0)
                return;
            size = htonl((uint32_t)n);
            if (whole(host, &size, sizeof size, 1) < 0 || whole(host, frame, (size_t)n, 1) < 0)
                return;
        }
    }
}

int network_start(unsigned offset, bool v1_17) {
    int tap, mtu = make_tap(&tap), host = call_host(offset);
    if (host < 0)
        return -1;
    uint32_t most = (uint32_t)mtu + FRAME_HEADER, first = v1_17 ? (uint32_t)mtu : htonl(most);
    if (whole(host, &first, sizeof first, 1) < 0)
        return -1;
    pid_t child = fork();
    if (child == 0) {
        forward(tap, host, most);
        say("network ended");
        _exit(0);
    }
    close(tap);
    close(host);
    return child;
}

void network_stop(int handle) {
    kill(handle, SIGKILL);
    waitpid(handle, NULL, 0);
}
