#include "launch/hostfile.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <set>
#include <string_view>

#include "base/check.h"
#include "launch/environment.h"

namespace uly::launch {
namespace {

constexpr int64_t kMostSlots = 1024;  // more on one machine is a slip of the pen

std::string_view trimmed(std::string_view text) {
  const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\r'; };
  while (!text.empty() && blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && blank(text.back())) text.remove_suffix(1);
  return text;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) parts.emplace_back();
    else parts.back() += c;
  }
  return parts;
}

// A name that ssh cannot take for an option, nor a shell for more than a word.
bool is_host_name(std::string_view name) {
  return !name.empty() && name.front() != '-' && std::all_of(name.begin(), name.end(), [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("._-:@%[]", c); });
}

Host host_of(std::string_view line, const std::string& where) {
  const size_t blank = line.find_first_of(" \t");
  std::string_view name = line.substr(0, blank), rest = blank == std::string_view::npos ? "" : trimmed(line.substr(blank));
  if (name.ends_with(':')) name.remove_suffix(1);
  rest = rest.substr(0, rest.find_first_of(" \t"));
  const std::optional<int64_t> slots = rest.starts_with("slots=") ? whole_number(rest.substr(6)) : std::nullopt;
  ULY_USER_CHECK(slots && is_host_name(name), "{}: expected `name slots=8`, found '{}'", where, line);
  ULY_USER_CHECK(*slots >= 1 && *slots <= kMostSlots, "{}: {}: expected 1 to {} slots, found {}", where, name, kMostSlots, *slots);
  Host host{.name = std::string(name), .slots = std::vector<int64_t>(static_cast<size_t>(*slots))};
  std::iota(host.slots.begin(), host.slots.end(), 0);
  return host;
}

// "a:0,2@b" as slots by host; none named: all that it has.
std::map<std::string, std::set<int64_t>> hosts_and_slots(const std::string& text, const char* option, const std::vector<Host>& hosts) {
  std::map<std::string, std::set<int64_t>> chosen;
  for (size_t at = 0; at <= text.size();) {
    // The longest name that stands here: names may have @ and : in them too.
    const std::string_view rest = std::string_view(text).substr(at);
    const Host* host = nullptr;
    for (const Host& h : hosts) {
      const bool ends = rest.size() == h.name.size() || (rest.size() > h.name.size() && (rest[h.name.size()] == '@' || rest[h.name.size()] == ':'));
      if (ends && rest.starts_with(h.name) && (!host || h.name.size() > host->name.size())) host = &h;
    }
    ULY_USER_CHECK(host, "{}: expected hosts of the hostfile, as in host:0,2@other, found '{}'", option, rest.substr(0, rest.find_first_of(":@")));
    const size_t after = at + host->name.size(), end = std::min(text.find('@', after), text.size());
    std::set<int64_t>& slots = chosen[host->name];
    if (after == end) slots.insert(host->slots.begin(), host->slots.end());
    else
      for (const std::string& number : split(text.substr(after + 1, end - after - 1), ',')) {
        const std::optional<int64_t> slot = whole_number(number);
        ULY_USER_CHECK(slot && std::find(host->slots.begin(), host->slots.end(), *slot) != host->slots.end(), "{}: {}: expected slots 0 to {}, found '{}'", option, host->name, host->slots.size() - 1, number);
        slots.insert(*slot);
      }
    at = end + 1;
  }
  return chosen;
}

}  // namespace

std::vector<Host> read_hostfile(const std::string& path) {
  std::ifstream file(path);
  ULY_USER_CHECK(file.good(), "--hostfile: {} cannot be read: {}", path, std::strerror(errno));
  std::vector<Host> hosts;
  std::string text;
  for (int64_t number = 1; std::getline(file, text); ++number) {
    if (number == 1 && text.starts_with("\xef\xbb\xbf")) text.erase(0, 3);  // as some editors begin a file
    const std::string_view line = trimmed(std::string_view(text).substr(0, text.find('#')));
    if (line.empty()) continue;
    const std::string where = fmt::format("{}:{}", path, number);
    Host host = host_of(line, where);
    ULY_USER_CHECK(std::none_of(hosts.begin(), hosts.end(), [&](const Host& h) { return h.name == host.name; }), "{}: {} was named before: expected a line a host", where, host.name);
    hosts.push_back(std::move(host));
  }
  ULY_USER_CHECK(!hosts.empty(), "{}: expected lines like `name slots=8`, found none", path);
  return hosts;
}

std::vector<Host> choose_hosts(const std::vector<Host>& hosts, const HostChoice& choice) {
  ULY_USER_CHECK(choice.include.empty() || choice.exclude.empty(), "--include and --exclude: expected one of them, found both");
  ULY_USER_CHECK((choice.include.empty() && choice.exclude.empty()) || (choice.num_nodes == 0 && choice.num_gpus == 0), "{}: expected neither --num_nodes nor --num_gpus besides", choice.include.empty() ? "--exclude" : "--include");
  ULY_USER_CHECK(choice.num_nodes <= static_cast<int64_t>(hosts.size()), "--num_nodes: expected at most {}, the hosts there are, found {}", hosts.size(), choice.num_nodes);
  std::vector<Host> all = hosts;
  if (choice.num_nodes > 0) all.resize(static_cast<size_t>(choice.num_nodes));
  for (Host& host : all) {
    ULY_USER_CHECK(choice.num_gpus <= static_cast<int64_t>(host.slots.size()), "--num_gpus: expected at most {}, the slots of {}, found {}", host.slots.size(), host.name, choice.num_gpus);
    if (choice.num_gpus > 0) host.slots.resize(static_cast<size_t>(choice.num_gpus));
  }
  const bool include = !choice.include.empty();
  if (include || !choice.exclude.empty()) {
    const auto named = hosts_and_slots(include ? choice.include : choice.exclude, include ? "--include" : "--exclude", hosts);
    for (Host& host : all) {
      const auto found = named.find(host.name);
      std::erase_if(host.slots, [&](int64_t slot) { return (found != named.end() && found->second.contains(slot)) != include; });
    }
  }
  std::erase_if(all, [](const Host& host) { return host.slots.empty(); });
  ULY_USER_CHECK(!all.empty(), "--exclude: expected to leave a slot, found '{}'", choice.exclude);
  return all;
}

bool is_this_machine(const std::string& host) {
  const std::string name = host.substr(host.find('@') == std::string::npos ? 0 : host.find('@') + 1);
  if (name == "localhost" || name == "::1" || name.starts_with("127.")) return true;
  char mine[256] = "";
  ::gethostname(mine, sizeof mine - 1);
  const std::string full = mine;
  if (name == full || name == full.substr(0, full.find('.'))) return true;
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return false;
  bool found = false;
  for (const ifaddrs* i = list; i && !found; i = i->ifa_next) {
    if (!i->ifa_addr) continue;
    char text[INET6_ADDRSTRLEN] = "";
    if (i->ifa_addr->sa_family == AF_INET) ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(i->ifa_addr)->sin_addr, text, sizeof text);
    if (i->ifa_addr->sa_family == AF_INET6) ::inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(i->ifa_addr)->sin6_addr, text, sizeof text);
    found = name == text;
  }
  ::freeifaddrs(list);
  return found;
}

}  // namespace uly::launch
