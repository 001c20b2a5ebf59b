// Messages between the ranks of one group, over c10d's Gloo transport. Everything of c10d is behind this header, in
// gloo.cc. A message is completed by Gloo's own thread; nothing here computes.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

namespace uly::comm {

// A key-value store that all ranks see; groups find each other through it.
class Store {
 public:
  struct Inside;
  explicit Store(std::unique_ptr<Inside> inside);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;
  Inside& inside() const { return *inside_; }

  // Throw std::exception with c10d's own words. `add` returns the sum, `get` waits for the key.
  void set(const std::string& key, const std::string& value);
  std::string get(const std::string& key);
  int64_t add(const std::string& key, int64_t number);

 private:
  std::unique_ptr<Inside> inside_;
};

struct TcpAddress {
  std::string host;
  int port = 0;
  bool serves = false;  // this process holds the store's server
  std::chrono::milliseconds patience{0};  // for the server to be there
  std::chrono::milliseconds timeout{0};   // for a key
};

// Throws std::exception with c10d's own words.
std::shared_ptr<Store> open_tcp_store(const TcpAddress& address);

// This machine's address on the way to a host; "" where there is none but the loopback's.
std::string address_towards(const std::string& host, int port);

// A store within this process, for ranks that are threads.
std::shared_ptr<Store> make_thread_store();

// A message on its way. Its memory must stay until wait() has returned, or until the message is destroyed, which gives it
// up.
class Message {
 public:
  virtual ~Message() = default;
  // Throws std::exception with Gloo's words when the peer is gone or the time-out has passed.
  virtual void wait() = 0;
};

// Connects the `size` ranks that give the same `name`; returns when all are connected.
class Mesh {
 public:
  // `host`: the address this machine listens at; empty: its hostname. GLOO_SOCKET_IFNAME's interface instead, unless it is the loopback.
  Mesh(const Store& store, const std::string& name, int64_t rank, int64_t size, const std::string& host, std::chrono::milliseconds timeout);
  ~Mesh();
  Mesh(const Mesh&) = delete;
  Mesh& operator=(const Mesh&) = delete;

  // A send and a receive meet by (peer, tag). 0 <= tag < 2^31, 0 < bytes.
  std::unique_ptr<Message> send(const void* data, int64_t bytes, int64_t to, int32_t tag);
  std::unique_ptr<Message> receive(void* data, int64_t bytes, int64_t from, int32_t tag);

 private:
  struct Inside;
  std::unique_ptr<Inside> inside_;
};

}  // namespace uly::comm
