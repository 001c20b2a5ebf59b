#include "launch/lines.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>

namespace uly::launch {

void write_all(int fd, const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = ::write(fd, text.data() + at, text.size() - at);
    if (n < 0 && errno == EAGAIN) {  // whoever shares it has made it so
      pollfd room{fd, POLLOUT, 0};
      ::poll(&room, 1, -1);
    } else if (n < 0 && errno != EINTR) {
      return;
    }
    if (n > 0) at += static_cast<size_t>(n);
  }
}

bool LineReader::take() {
  char buffer[16384];
  ssize_t n = 0;
  while ((n = ::read(fd, buffer, sizeof buffer)) > 0) unfinished.append(buffer, static_cast<size_t>(n));
  if (n == 0 && !unfinished.empty() && unfinished.back() != '\n') unfinished += '\n';
  return n == 0;
}

void LineReader::close() {
  if (fd >= 0) ::close(fd);
  fd = -1;
}

}  // namespace uly::launch
