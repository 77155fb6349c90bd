/* Stands between a process and the C library (LD_PRELOAD): tells of calls, fails one of them, or holds some up.

   CALLS_UNDER   only calls on what has a name that begins so, and calls for sockets, threads and processes
   CALLS_LOG     a file that gets a line a call: "main" or "other" (which thread) or "child" (of another process
                 than the first), the call, what it is on
   CALLS_FAIL    CALL:NTH:ERRNO: the call of this name and number fails, and with NTH+ all later ones too
   CALLS_HANG    calls on the file of this name do not return as long as there is a file of that name with
                 ".hang" behind it, except those that never wait
*/

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

typedef long call_kernel(long number, ...);
static call_kernel *kernel(void)
{
    static call_kernel *real;
    if (!real)
        real = (call_kernel *)dlsym(RTLD_NEXT, "syscall");
    return real;
}

/* The kernel itself, so that nothing in here comes back to us. */
#define KERNEL(number, ...) kernel()(SYS_##number, __VA_ARGS__)

static const char *under, *hanging;
static char fail_call[64], hang_flag[PATH_MAX];
static int log_fd = -1, fail_nth, fail_errno, fails_on;
static int seen;
static long first;

/* Also for a process that was forked and has set its environment. */
__attribute__((constructor)) void calls_begin(void)
{
    const char *log = getenv("CALLS_LOG"), *fail = getenv("CALLS_FAIL");
    under = getenv("CALLS_UNDER");
    hanging = getenv("CALLS_HANG");
    if (log) {
        int fd = KERNEL(openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        /* Out of the way: numbers are what they would be without us. */
        log_fd = KERNEL(fcntl, fd, F_DUPFD_CLOEXEC, 900);
        KERNEL(close, fd);
    }
    if (fail) {
        char on = 0;
        if (sscanf(fail, "%63[^:]:%d:%d", fail_call, &fail_nth, &fail_errno) != 3 &&
            sscanf(fail, "%63[^:]:%d%c:%d", fail_call, &fail_nth, &on, &fail_errno) != 4)
            abort();
        fails_on = on == '+';
    }
    const char *process = getenv("CALLS_PROCESS");
    first = process ? atol(process) : KERNEL(getpid, 0);
    if (!process) {
        char number[20];
        snprintf(number, sizeof number, "%ld", first);
        setenv("CALLS_PROCESS", number, 1);
    }
    if (hanging)
        snprintf(hang_flag, sizeof hang_flag, "%s.hang", hanging);
}

/* Whether the call is to fail; errno is set then. `what`: a name, or where there is none NULL. */
static int meets(const char *call, const char *what)
{
    int kept = errno;
    if (what && (!under || strncmp(what, under, strlen(under))))
        return 0;
    if (log_fd >= 0) {
        char line[PATH_MAX + 100];
        const char *who = KERNEL(getpid, 0) != first ? "child" : KERNEL(gettid, 0) == first ? "main" : "other";
        int length = snprintf(line, sizeof line, "%s %s %s\n", who, call, what ? what : "-");
        KERNEL(write, log_fd, line, length);
    }
    if (!strcmp(call, fail_call)) {
        int nth = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
        if (nth == fail_nth || (fails_on && nth > fail_nth)) {
            errno = fail_errno;
            return 1;
        }
    }
    while (what && hanging && !strcmp(what, hanging) && !strstr(call, "nowait") &&
           !KERNEL(faccessat, AT_FDCWD, hang_flag, F_OK))
        poll(NULL, 0, 5);
    errno = kept;
    return 0;
}

static int meets_fd(const char *call, int fd)
{
    char link[40], what[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = KERNEL(readlinkat, AT_FDCWD, link, what, sizeof what - 1);
    if (length < 0)
        return 0;
    what[length] = 0;
    if (!strncmp(what, "socket:", 7))
        return meets(call, NULL);
    return what[0] == '/' && meets(call, what);
}

/* Of a socket the call has no errors to be tried. */
static int meets_file(const char *call, int fd)
{
    int type;
    unsigned length = sizeof type;
    return KERNEL(getsockopt, fd, SOL_SOCKET, SO_TYPE, &type, &length) && meets_fd(call, fd);
}

/* A socket without a name is one of a pair: a process wakes itself up with it, and that has no errors. */
static int meets_write(int fd)
{
    struct sockaddr_un name;
    unsigned length = sizeof name;
    int is_pair = !KERNEL(getsockname, fd, &name, &length) && name.sun_family == AF_UNIX &&
                  length == sizeof name.sun_family;
    return !is_pair && meets_fd("write", fd);
}

static int meets_at(const char *call, int folder, const char *path)
{
    char link[40], what[2 * PATH_MAX];
    if (!path || !*path)
        return meets_fd(call, folder);
    if (path[0] == '/')
        return meets(call, path);
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    long length = KERNEL(readlinkat, AT_FDCWD, link, what, PATH_MAX);
    if (length < 0)
        return 0;
    snprintf(what + length, PATH_MAX, "/%s", path);
    return meets(call, what);
}

/* `name` is a call with these parameters, passed on as `args`, that fails where `met` says so. In C it has a
   name of its own, as the headers have other types for some of them. */
#define CALL(result, name, met, params, args)   \
    result calls_##name params __asm__(#name);  \
    result calls_##name params                  \
    {                                           \
        static result(*real) params;            \
        if (!real)                              \
            real = dlsym(RTLD_NEXT, #name);     \
        return met ? -1 : real args;            \
    }

#define WITH_64(result, name, met, params, args) \
    CALL(result, name, met, params, args)        \
    CALL(result, name##64, met, params, args)

/* -- by descriptor ------------------------------------------------------------------------- */

WITH_64(int, fstat, meets_file("fstat", fd), (int fd, void *to), (fd, to))
WITH_64(off_t, lseek, meets_fd("lseek", fd), (int fd, off_t offset, int whence), (fd, offset, whence))
WITH_64(int, ftruncate, meets_fd("ftruncate", fd), (int fd, off_t length), (fd, length))
WITH_64(int, fallocate, meets_fd("fallocate", fd), (int fd, int mode, off_t offset, off_t length),
        (fd, mode, offset, length))
WITH_64(int, fstatvfs, meets_fd("fstatvfs", fd), (int fd, void *to), (fd, to))
WITH_64(ssize_t, pread, meets_fd("pread", fd), (int fd, void *to, size_t length, off_t offset),
        (fd, to, length, offset))
WITH_64(ssize_t, pwrite, meets_fd("pwrite", fd), (int fd, const void *from, size_t length, off_t offset),
        (fd, from, length, offset))
WITH_64(ssize_t, preadv, meets_fd("preadv", fd), (int fd, const struct iovec *to, int count, off_t offset),
        (fd, to, count, offset))
WITH_64(ssize_t, pwritev, meets_fd("pwritev", fd), (int fd, const struct iovec *from, int count, off_t offset),
        (fd, from, count, offset))
CALL(ssize_t, preadv64v2, meets_fd(flags & RWF_NOWAIT ? "preadv-nowait" : "preadv", fd),
     (int fd, const struct iovec *to, int count, off_t offset, int flags), (fd, to, count, offset, flags))
CALL(ssize_t, read, meets_fd("read", fd), (int fd, void *to, size_t length), (fd, to, length))
CALL(ssize_t, write, meets_write(fd), (int fd, const void *from, size_t length), (fd, from, length))
CALL(int, fsync, meets_fd("fsync", fd), (int fd), (fd))
CALL(int, fdatasync, meets_fd("fdatasync", fd), (int fd), (fd))
CALL(int, sync_file_range, meets_fd("sync_file_range", fd), (int fd, off_t offset, off_t length, unsigned flags),
     (fd, offset, length, flags))
CALL(int, fchmod, meets_fd("fchmod", fd), (int fd, mode_t mode), (fd, mode))
CALL(int, flock, meets_fd("flock", fd), (int fd, int kind), (fd, kind))
CALL(int, ioctl, meets_file("ioctl", fd), (int fd, unsigned long request, void *argument), (fd, request, argument))
CALL(int, dup2, meets_fd("dup2", fd), (int fd, int to), (fd, to))
CALL(int, dup3, meets_fd("dup3", fd), (int fd, int to, int flags), (fd, to, flags))

static int fcntl_meets(int fd, int command)
{
    switch (command) {
    case F_SETLK:
    case F_OFD_SETLK:
        return meets_fd("lock", fd);
    case F_GETLK:
    case F_OFD_GETLK:
        return meets_fd("ask-lock", fd);
    case F_DUPFD:
    case F_DUPFD_CLOEXEC:
        return meets_fd("dup", fd);
    }
    return 0;
}

WITH_64(int, fcntl, fcntl_meets(fd, command), (int fd, int command, void *argument), (fd, command, argument))

/* A descriptor is closed, whatever is told. */
int calls_close(int fd) __asm__("close");
int calls_close(int fd)
{
    int met = meets_file("close", fd);
    int result = KERNEL(close, fd);
    if (met)
        errno = fail_errno;
    return met ? -1 : result;
}

/* -- by name --------------------------------------------------------------------------------- */

WITH_64(int, open, meets_at("open", AT_FDCWD, path), (const char *path, int flags, mode_t mode),
        (path, flags, mode))
WITH_64(int, openat, meets_at("open", folder, path), (int folder, const char *path, int flags, mode_t mode),
        (folder, path, flags, mode))
WITH_64(int, stat, meets_at("stat", AT_FDCWD, path), (const char *path, void *to), (path, to))
WITH_64(int, lstat, meets_at("lstat", AT_FDCWD, path), (const char *path, void *to), (path, to))
WITH_64(int, fstatat, meets_at("stat", folder, path), (int folder, const char *path, void *to, int flags),
        (folder, path, to, flags))
CALL(int, statx, meets_at(flags & AT_STATX_DONT_SYNC ? "fstat-nowait" : path && *path ? "stat" : "fstat", folder, path),
     (int folder, const char *restrict path, int flags, unsigned mask, struct statx *restrict to),
     (folder, path, flags, mask, to))
CALL(int, access, meets_at("access", AT_FDCWD, path), (const char *path, int mode), (path, mode))
CALL(int, faccessat, meets_at("access", folder, path), (int folder, const char *path, int mode, int flags),
     (folder, path, mode, flags))
CALL(ssize_t, readlink, meets_at("readlink", AT_FDCWD, path),
     (const char *restrict path, char *restrict to, size_t length), (path, to, length))
CALL(int, unlink, meets_at("unlink", AT_FDCWD, path), (const char *path), (path))
CALL(int, unlinkat, meets_at("unlink", folder, path), (int folder, const char *path, int flags),
     (folder, path, flags))
CALL(int, mkdir, meets_at("mkdir", AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
CALL(int, chmod, meets_at("chmod", AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
CALL(int, fchmodat, meets_at("chmod", folder, path), (int folder, const char *path, mode_t mode, int flags),
     (folder, path, mode, flags))
CALL(int, rename, meets_at("rename", AT_FDCWD, path), (const char *path, const char *to), (path, to))
CALL(int, renameat, meets_at("rename", folder, path), (int folder, const char *path, int other, const char *to),
     (folder, path, other, to))

/* -- calls that the C library has no function for ------------------------------------------------ */

long calls_syscall(long number, long a, long b, long c, long d, long e, long f) __asm__("syscall");
long calls_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    int met = number == SYS_openat2    ? meets_at("open", a, (const char *)b)
              : number == SYS_io_setup ? meets("io-setup", NULL)
              : number == SYS_io_submit ? meets("io-submit", NULL)
                                        : 0;
    return met ? -1 : kernel()(number, a, b, c, d, e, f);
}

/* -- sockets, threads, processes --------------------------------------------------------------- */

static int meets_address(const char *call, int fd, const struct sockaddr *address)
{
    (void)fd;
    if (address->sa_family != AF_UNIX)
        return meets(call, NULL);
    return meets_at(call, AT_FDCWD, ((const struct sockaddr_un *)address)->sun_path);
}

CALL(int, socket, meets("socket", NULL), (int domain, int type, int protocol), (domain, type, protocol))
CALL(int, socketpair, meets("socketpair", NULL), (int domain, int type, int protocol, int fds[2]),
     (domain, type, protocol, fds))
CALL(int, bind, meets_address("bind", fd, address), (int fd, const struct sockaddr *address, socklen_t length),
     (fd, address, length))
CALL(int, connect, meets_address("connect", fd, address),
     (int fd, const struct sockaddr *address, socklen_t length), (fd, address, length))
CALL(int, listen, meets_fd("listen", fd), (int fd, int backlog), (fd, backlog))
CALL(int, accept4, meets_fd("accept", fd),
     (int fd, struct sockaddr *restrict address, socklen_t *restrict length, int flags),
     (fd, address, length, flags))
CALL(int, setsockopt, meets_fd("setsockopt", fd),
     (int fd, int level, int name, const void *value, socklen_t length), (fd, level, name, value, length))
CALL(int, getsockopt, meets_fd("getsockopt", fd),
     (int fd, int level, int name, void *restrict value, socklen_t *restrict length),
     (fd, level, name, value, length))
CALL(int, getsockname, meets_fd("getsockname", fd),
     (int fd, struct sockaddr *restrict address, socklen_t *restrict length), (fd, address, length))
CALL(pid_t, fork, meets("fork", NULL), (void), ())
CALL(pid_t, setsid, meets("setsid", NULL), (void), ())
CALL(int, pipe, meets("pipe", NULL), (int fds[2]), (fds))
CALL(int, pipe2, meets("pipe", NULL), (int fds[2], int flags), (fds, flags))

/* Tells its error by what it returns. */
int calls_thread(void *thread, const void *attributes, void *(*run)(void *), void *argument)
    __asm__("pthread_create");
int calls_thread(void *thread, const void *attributes, void *(*run)(void *), void *argument)
{
    static int (*real)(void *, const void *, void *(*)(void *), void *);
    if (!real)
        real = dlsym(RTLD_NEXT, "pthread_create");
    return meets("thread", NULL) ? errno : real(thread, attributes, run, argument);
}
