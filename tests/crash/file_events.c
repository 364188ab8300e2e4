/* Counts the calls that change files below one directory, and kills the process before, or in the middle of, one of them.

   Preloaded (LD_PRELOAD) into the process under test; idle until `file_events_arm` is called. It stands before libc, so
   it sees what Python, libstdc++ (torch) and Rust (safetensors, tokenizers) do alike. The calls that stdio makes inside
   libc (fwrite, fclose) it cannot see: test_events.py asks strace whether there are any.

   cc -shared -fPIC -O1 -o file_events.so file_events.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, LOG, KILL, TEAR };

static volatile int mode = OFF;
static long events, at;
static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1;

#define REAL(result, name, ...)                                                                                        \
    static result (*real)(__VA_ARGS__);                                                                                \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static int below_root(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = 0;
    return n > 0 && path[0] == '/';
}

static void resolve(int directory, const char *name, char *path) {
    char base[PATH_MAX];
    if (name[0] == '/') base[0] = 0;
    else if (directory == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; }
    else path_of_fd(directory, base);
    size_t length = strlen(base), wanted = strlen(name) + 1;
    if (length + 1 + wanted > PATH_MAX) abort();
    memcpy(path, base, length);
    if (length) path[length++] = '/';
    memcpy(path + length, name, wanted);
}

/* One event. Returns whether the caller is to do half of it and then die. */
static int event(const char *kind, size_t bytes, const char *path, const char *target) {
    long number = __atomic_add_fetch(&events, 1, __ATOMIC_SEQ_CST);
    if (mode == LOG) {
        char line[2 * PATH_MAX + 100];
        int n = snprintf(line, sizeof line, "%ld\t%s\t%zu\t%s\t%s\n", number, kind, bytes, path, target);
        if (syscall(SYS_write, log_fd, line, n) != n) abort();
    } else if (number == at) {
        if (mode == KILL) die();
        return 1;
    }
    return 0;
}

static int at_path(const char *kind, int directory, const char *name) {
    char path[PATH_MAX];
    int saved = errno;
    int tear = 0;
    if (mode != OFF && name) {
        resolve(directory, name, path);
        if (below_root(path)) tear = event(kind, 0, path, "");
    }
    errno = saved;
    return tear;
}

static int at_fd(const char *kind, int fd, size_t bytes) {
    char path[PATH_MAX];
    int saved = errno;
    int tear = mode != OFF && path_of_fd(fd, path) && below_root(path) && event(kind, bytes, path, "");
    errno = saved;
    return tear;
}

static int at_paths(const char *kind, int from_directory, const char *from, int to_directory, const char *to) {
    char path[PATH_MAX], target[PATH_MAX];
    int saved = errno;
    int tear = 0;
    if (mode != OFF) {
        resolve(from_directory, from, path);
        resolve(to_directory, to, target);
        if (below_root(path) || below_root(target)) tear = event(kind, 0, path, target);
    }
    errno = saved;
    return tear;
}

/* What Python calls through ctypes. `what`: 1 log every event to `log`, 2 die before event `number`, 3 do half of it. */
int file_events_arm(const char *directory, int what, long number, const char *log) {
    mode = OFF;
    if (!realpath(directory, root)) return -1;
    root_length = strlen(root);
    events = 0;
    at = number;
    if (what == LOG) {
        log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (log_fd < 0) return -1;
    }
    mode = what;
    return 0;
}

/* Returns the number of events; dies if that many came and the next one was to be the last. */
long file_events_disarm(void) {
    if (mode == KILL && events + 1 == at) die();
    mode = OFF;
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = -1;
    return events;
}

/* Opening counts where it can make a file or empty one. */
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))
#define MODE_OF(flags)                                                                                                 \
    mode_t permissions = 0;                                                                                            \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                                           \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        permissions = va_arg(list, mode_t);                                                                            \
        va_end(list);                                                                                                  \
    }
#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        MODE_OF(flags)                                                                                                 \
        REAL(int, #name, const char *, int, ...);                                                                      \
        if (CHANGES(flags) && at_path("create", AT_FDCWD, path)) die();                                                \
        return real(path, flags, permissions);                                                                         \
    }
#define OPENAT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        MODE_OF(flags)                                                                                                 \
        REAL(int, #name, int, const char *, int, ...);                                                                 \
        if (CHANGES(flags) && at_path("create", directory, path)) die();                                               \
        return real(directory, path, flags, permissions);                                                              \
    }
#define CREAT(name)                                                                                                    \
    int name(const char *path, mode_t permissions) {                                                                   \
        REAL(int, #name, const char *, mode_t);                                                                        \
        if (at_path("create", AT_FDCWD, path)) die();                                                                  \
        return real(path, permissions);                                                                                \
    }
#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *how) {                                                                    \
        REAL(FILE *, #name, const char *, const char *);                                                               \
        if (strpbrk(how, "wa") && at_path("create", AT_FDCWD, path)) die();                                            \
        return real(path, how);                                                                                        \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) CREAT(creat) CREAT(creat64) FOPEN(fopen) FOPEN(fopen64)

/* Writing: the half is written with the same call, then the process dies. */
ssize_t write(int fd, const void *data, size_t bytes) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (at_fd("write", fd, bytes)) { (void)!real(fd, data, bytes / 2); die(); }
    return real(fd, data, bytes);
}
#define PWRITE(name, offset_type)                                                                                      \
    ssize_t name(int fd, const void *data, size_t bytes, offset_type offset) {                                         \
        REAL(ssize_t, #name, int, const void *, size_t, offset_type);                                                  \
        if (at_fd("write", fd, bytes)) { (void)!real(fd, data, bytes / 2, offset); die(); }                            \
        return real(fd, data, bytes, offset);                                                                          \
    }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)

static size_t total(const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    return bytes;
}
/* The first half of `parts`, in place: the process is about to die. */
static int halve(struct iovec *parts, int count) {
    size_t left = total(parts, count) / 2;
    for (int i = 0; i < count; i++) {
        if (left <= parts[i].iov_len) { parts[i].iov_len = left; return i + 1; }
        left -= parts[i].iov_len;
    }
    return count;
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (at_fd("write", fd, total(parts, count))) { (void)!real(fd, parts, halve((struct iovec *)parts, count)); die(); }
    return real(fd, parts, count);
}
#define PWRITEV(name, offset_type)                                                                                     \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset) {                                   \
        REAL(ssize_t, #name, int, const struct iovec *, int, offset_type);                                             \
        if (at_fd("write", fd, total(parts, count))) {                                                                 \
            (void)!real(fd, parts, halve((struct iovec *)parts, count), offset);                                       \
            die();                                                                                                     \
        }                                                                                                              \
        return real(fd, parts, count, offset);                                                                         \
    }
PWRITEV(pwritev, off_t) PWRITEV(pwritev64, off64_t)
#define SENDFILE(name, offset_type)                                                                                    \
    ssize_t name(int out, int in, offset_type *offset, size_t bytes) {                                                 \
        REAL(ssize_t, #name, int, int, offset_type *, size_t);                                                         \
        if (at_fd("write", out, bytes)) { (void)!real(out, in, offset, bytes / 2); die(); }                            \
        return real(out, in, offset, bytes);                                                                           \
    }
SENDFILE(sendfile, off_t) SENDFILE(sendfile64, off64_t)
ssize_t copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t bytes, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    if (at_fd("write", out, bytes)) { (void)!real(in, in_offset, out, out_offset, bytes / 2, flags); die(); }
    return real(in, in_offset, out, out_offset, bytes, flags);
}

/* A file written through shared memory would escape: only noted, so that the tests can refuse it. */
#define MMAP(name, offset_type)                                                                                        \
    void *name(void *address, size_t bytes, int access, int flags, int fd, offset_type offset) {                       \
        REAL(void *, #name, void *, size_t, int, int, int, offset_type);                                               \
        if (fd >= 0 && (access & PROT_WRITE) && (flags & MAP_SHARED) && at_fd("mmap", fd, bytes)) die();               \
        return real(address, bytes, access, flags, fd, offset);                                                        \
    }
MMAP(mmap, off_t) MMAP(mmap64, off64_t)

/* The others happen as a whole or not at all; a tear is a kill before them. */
#define ON_FD(name, kind)                                                                                              \
    int name(int fd) {                                                                                                 \
        REAL(int, #name, int);                                                                                         \
        if (at_fd(kind, fd, 0)) die();                                                                                 \
        return real(fd);                                                                                               \
    }
ON_FD(fsync, "fsync") ON_FD(fdatasync, "fsync")
#define FTRUNCATE(name, length_type)                                                                                   \
    int name(int fd, length_type length) {                                                                             \
        REAL(int, #name, int, length_type);                                                                            \
        if (at_fd("truncate", fd, length)) die();                                                                      \
        return real(fd, length);                                                                                       \
    }
FTRUNCATE(ftruncate, off_t) FTRUNCATE(ftruncate64, off64_t)
#define FALLOCATE(name, type)                                                                                          \
    int name(int fd, int how, type offset, type bytes) {                                                               \
        REAL(int, #name, int, int, type, type);                                                                        \
        if (at_fd("truncate", fd, bytes)) die();                                                                       \
        return real(fd, how, offset, bytes);                                                                           \
    }
FALLOCATE(fallocate, off_t) FALLOCATE(fallocate64, off64_t)
#define POSIX_FALLOCATE(name, type)                                                                                    \
    int name(int fd, type offset, type bytes) {                                                                        \
        REAL(int, #name, int, type, type);                                                                             \
        if (at_fd("truncate", fd, bytes)) die();                                                                       \
        return real(fd, offset, bytes);                                                                                \
    }
POSIX_FALLOCATE(posix_fallocate, off_t) POSIX_FALLOCATE(posix_fallocate64, off64_t)
#define ON_PATH(name, kind)                                                                                            \
    int name(const char *path) {                                                                                       \
        REAL(int, #name, const char *);                                                                                \
        if (at_path(kind, AT_FDCWD, path)) die();                                                                      \
        return real(path);                                                                                             \
    }
ON_PATH(unlink, "unlink") ON_PATH(rmdir, "rmdir") ON_PATH(remove, "unlink")
int unlinkat(int directory, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    if (at_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, path)) die();
    return real(directory, path, flags);
}
int mkdir(const char *path, mode_t permissions) {
    REAL(int, "mkdir", const char *, mode_t);
    if (at_path("mkdir", AT_FDCWD, path)) die();
    return real(path, permissions);
}
int mkdirat(int directory, const char *path, mode_t permissions) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    if (at_path("mkdir", directory, path)) die();
    return real(directory, path, permissions);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (at_paths("rename", AT_FDCWD, from, AT_FDCWD, to)) die();
    return real(from, to);
}
int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    if (at_paths("rename", from_directory, from, to_directory, to)) die();
    return real(from_directory, from, to_directory, to);
}
int renameat2(int from_directory, const char *from, int to_directory, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    if (at_paths("rename", from_directory, from, to_directory, to)) die();
    return real(from_directory, from, to_directory, to, flags);
}
int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    if (at_paths("link", AT_FDCWD, from, AT_FDCWD, to)) die();
    return real(from, to);
}
int symlink(const char *from, const char *to) {
    REAL(int, "symlink", const char *, const char *);
    if (at_path("link", AT_FDCWD, to)) die();
    return real(from, to);
}
