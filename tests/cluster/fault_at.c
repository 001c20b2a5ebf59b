// Preloaded into a rank: at the FAULT_AT-th call that changes something below a folder named FAULT_PLACE it is killed (FAULT_WHAT=kill), in a
// write after half of it, or the disk is full from there on (full). FAULT_LOG: a file that gets a line for each such call.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int concerns_us(void) {
  const char *rank = getenv("RANK"), *ours = getenv("FAULT_RANK");
  return rank && ours && strcmp(rank, ours) == 0;
}

// 0: goes on; 1: the moment has come. `full` is handled by the callers.
static int reached(const char* call, const char* path) {
  static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  static long count;
  if (!concerns_us() || !getenv("FAULT_PLACE") || !strstr(path, getenv("FAULT_PLACE"))) return 0;
  pthread_mutex_lock(&mutex);
  const long n = ++count;
  pthread_mutex_unlock(&mutex);
  if (getenv("FAULT_LOG")) {
    FILE* log = fopen(getenv("FAULT_LOG"), "a");
    fprintf(log, "%ld %s %s\n", n, call, path);
    fclose(log);
  }
  const char* at = getenv("FAULT_AT");
  const int full = getenv("FAULT_WHAT") && strcmp(getenv("FAULT_WHAT"), "full") == 0;
  return at && (full ? n >= atol(at) : n == atol(at));
}

static int is_full(void) { return strcmp(getenv("FAULT_WHAT"), "full") == 0; }

static int fails(const char* call, const char* path) {
  if (!reached(call, path)) return 0;
  if (!is_full()) kill(getpid(), SIGKILL);
  errno = ENOSPC;
  return 1;
}

static void name_of(int fd, char* path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, size - 1);
  path[n > 0 ? n : 0] = 0;
}

#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))

static int opened(const char* symbol, int at, const char* path, int flags, mode_t mode) {
  if ((flags & O_CREAT) && fails("open", path)) return -1;
  if (at == AT_FDCWD && strncmp(symbol, "openat", 6) != 0) return NEXT(int (*)(const char*, int, ...), symbol)(path, flags, mode);
  return NEXT(int (*)(int, const char*, int, ...), symbol)(at, path, flags, mode);
}
#define MODE(last)                    \
  mode_t mode = 0;                    \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list more;                     \
    va_start(more, last);             \
    mode = va_arg(more, mode_t);      \
    va_end(more);                     \
  }
int open(const char* path, int flags, ...) { MODE(flags) return opened("open", AT_FDCWD, path, flags, mode); }
int open64(const char* path, int flags, ...) { MODE(flags) return opened("open64", AT_FDCWD, path, flags, mode); }
int openat(int at, const char* path, int flags, ...) { MODE(flags) return opened("openat", at, path, flags, mode); }
int openat64(int at, const char* path, int flags, ...) { MODE(flags) return opened("openat64", at, path, flags, mode); }

ssize_t write(int fd, const void* data, size_t size) {
  static __thread int inside;
  ssize_t (*next)(int, const void*, size_t) = NEXT(ssize_t (*)(int, const void*, size_t), "write");
  if (inside || fd <= 2 || !concerns_us()) return next(fd, data, size);
  inside = 1;
  char path[4096];
  name_of(fd, path, sizeof path);
  const int now = reached("write", path);
  inside = 0;
  if (!now) return next(fd, data, size);
  if (!is_full()) {
    next(fd, data, size / 2);
    kill(getpid(), SIGKILL);
  }
  errno = ENOSPC;
  return -1;
}

int fsync(int fd) {
  char path[4096];
  name_of(fd, path, sizeof path);
  return fails("fsync", path) ? -1 : NEXT(int (*)(int), "fsync")(fd);
}
int rename(const char* from, const char* to) { return fails("rename", to) ? -1 : NEXT(int (*)(const char*, const char*), "rename")(from, to); }
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) { return fails("renameat2", to) ? -1 : NEXT(int (*)(int, const char*, int, const char*, unsigned), "renameat2")(a, from, b, to, flags); }
int mkdir(const char* path, mode_t mode) { return fails("mkdir", path) ? -1 : NEXT(int (*)(const char*, mode_t), "mkdir")(path, mode); }
// Removing needs no room: only a kill comes here.
static void removes(const char* call, const char* path) {
  if (reached(call, path) && !is_full()) kill(getpid(), SIGKILL);
}
int unlink(const char* path) {
  removes("unlink", path);
  return NEXT(int (*)(const char*), "unlink")(path);
}
int unlinkat(int at, const char* name, int flags) {
  char path[8192] = "";
  if (at != AT_FDCWD) name_of(at, path, 4096), strcat(path, "/");
  strncat(path, name, sizeof path - strlen(path) - 1);
  removes("unlinkat", path);
  return NEXT(int (*)(int, const char*, int), "unlinkat")(at, name, flags);
}
int remove(const char* path) {
  removes("remove", path);
  return NEXT(int (*)(const char*), "remove")(path);
}
int rmdir(const char* path) {
  removes("rmdir", path);
  return NEXT(int (*)(const char*), "rmdir")(path);
}
