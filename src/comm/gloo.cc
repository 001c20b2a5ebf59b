#include "comm/gloo.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/check.h"

namespace uly::comm {

struct Store::Inside {
  c10::intrusive_ptr<c10d::Store> store;
};

Store::Store(std::unique_ptr<Inside> inside) : inside_(std::move(inside)) {}
Store::~Store() = default;

void Store::set(const std::string& key, const std::string& value) { inside_->store->set(key, value); }
std::string Store::get(const std::string& key) { return inside_->store->get_to_str(key); }
int64_t Store::add(const std::string& key, int64_t number) { return inside_->store->add(key, number); }

namespace {

// TCPStore's server listens at every interface; a job needs only the one by which its ranks come, so that is bound here and handed
// over.
int listen_at(in_addr interface, int port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) throw std::runtime_error(fmt::format("socket: {}", std::strerror(errno)));
  const int yes = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_port = htons(static_cast<uint16_t>(port));
  at.sin_addr = interface;
  if (::bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) != 0 || ::listen(fd, SOMAXCONN) != 0) {
    const int error = errno;
    ::close(fd);
    throw std::runtime_error(fmt::format("{}", std::strerror(error)));
  }
  return fd;
}

// The IPv4 address of a host that is a number or has a name.
std::optional<sockaddr_in> address_of(const std::string& host, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0 || !found) return std::nullopt;
  const sockaddr_in at = *reinterpret_cast<const sockaddr_in*>(found->ai_addr);
  ::freeaddrinfo(found);
  return at;
}

at::Tensor bytes_view(const void* data, int64_t bytes) { return at::from_blob(const_cast<void*>(data), {bytes}, at::TensorOptions().dtype(at::kByte)); }

class GlooMessage : public Message {
 public:
  explicit GlooMessage(c10::intrusive_ptr<c10d::Work> work) : work_(std::move(work)) {}
  void wait() override {
    if (!work_->wait()) throw std::runtime_error("aborted");
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
};

}  // namespace

std::shared_ptr<Store> open_tcp_store(const TcpAddress& address) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(address.port);
  options.isServer = address.serves;
  options.timeout = address.patience;
  options.waitWorkers = false;  // who has come is seen in the store
  if (address.serves)
    if (const auto at = address_of(address.host, address.port)) options.masterListenFd = listen_at(at->sin_addr, address.port);
  auto inside = std::make_unique<Store::Inside>();
  inside->store = c10::make_intrusive<c10d::TCPStore>(address.host, options);
  inside->store->setTimeout(address.timeout);
  return std::make_shared<Store>(std::move(inside));
}

std::string address_towards(const std::string& host, int port) {
  const auto there = address_of(host, port);
  const int fd = there ? ::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0) : -1;  // connecting it sends nothing
  sockaddr_in mine{};
  socklen_t size = sizeof mine;
  const bool known = fd >= 0 && ::connect(fd, reinterpret_cast<const sockaddr*>(&*there), sizeof *there) == 0 && ::getsockname(fd, reinterpret_cast<sockaddr*>(&mine), &size) == 0;
  if (fd >= 0) ::close(fd);
  char text[INET_ADDRSTRLEN] = "";
  if (known) ::inet_ntop(AF_INET, &mine.sin_addr, text, sizeof text);
  return std::string(text).starts_with("127.") ? "" : text;
}

std::shared_ptr<Store> make_thread_store() {
  auto inside = std::make_unique<Store::Inside>();
  inside->store = c10::make_intrusive<c10d::HashStore>();
  return std::make_shared<Store>(std::move(inside));
}

struct Mesh::Inside {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
};

Mesh::Mesh(const Store& store, const std::string& name, int64_t rank, int64_t size, const std::string& host, std::chrono::milliseconds timeout)
    : inside_(std::make_unique<Inside>()) {
  // Gloo writes to sockets whose peer may be gone; that must be an error here, not the end of this process.
  struct sigaction at_pipe {};
  if (::sigaction(SIGPIPE, nullptr, &at_pipe) == 0 && at_pipe.sa_handler == SIG_DFL) std::signal(SIGPIPE, SIG_IGN);
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
  if (interface && *interface && host != "127.0.0.1") options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface(interface));
  else options->devices.push_back(host.empty() ? c10d::ProcessGroupGloo::createDefaultDevice() : c10d::ProcessGroupGloo::createDeviceForHostname(host));
  options->threads = 1;  // its pool serves collectives, of which none are used
  auto named = c10::make_intrusive<c10d::PrefixStore>(name, store.inside().store);
  named->setTimeout(timeout);
  inside_->group = c10::make_intrusive<c10d::ProcessGroupGloo>(named, static_cast<int>(rank), static_cast<int>(size), options);
}

Mesh::~Mesh() = default;

std::unique_ptr<Message> Mesh::send(const void* data, int64_t bytes, int64_t to, int32_t tag) {
  std::vector<at::Tensor> view = {bytes_view(data, bytes)};
  return std::make_unique<GlooMessage>(inside_->group->send(view, static_cast<int>(to), tag));
}

std::unique_ptr<Message> Mesh::receive(void* data, int64_t bytes, int64_t from, int32_t tag) {
  std::vector<at::Tensor> view = {bytes_view(data, bytes)};
  return std::make_unique<GlooMessage>(inside_->group->recv(view, static_cast<int>(from), tag));
}

}  // namespace uly::comm
