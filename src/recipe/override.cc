#include "recipe/override.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/check.h"
#include "recipe/secret.h"

namespace uly::recipe {
namespace {

std::vector<std::string> parts_of(const std::string& path) {
  std::vector<std::string> out;
  size_t start = 0;
  while (true) {
    const size_t end = std::min(path.find('.', start), path.size());
    out.push_back(path.substr(start, end - start));
    if (end == path.size()) return out;
    start = end + 1;
  }
}

std::optional<size_t> index_of(const std::string& part) {
  const bool digits = !part.empty() && part.size() < 7 && std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
  return digits ? std::optional(static_cast<size_t>(std::stoul(part))) : std::nullopt;
}

struct Path {
  std::string assignment;  // as it may be shown
  std::vector<std::string> parts;
};

NodePtr replaced(const NodePtr& old, const Path& path, size_t at, const NodePtr& value);

NodePtr replaced_in_list(const Node& old, const Path& path, size_t at, const NodePtr& value) {
  const auto index = index_of(path.parts[at]);
  if (!index || *index > old.items.size()) {
    user_error("command line: '{}': expected an index from 0 to {}, found '{}'", path.assignment, old.items.size(), path.parts[at]);
  }
  auto node = std::make_shared<Node>(old);
  if (*index == node->items.size()) node->items.push_back(nullptr);
  node->items[*index] = replaced(node->items[*index], path, at + 1, value);
  return node;
}

NodePtr replaced_in_mapping(const Node& old, const Path& path, size_t at, const NodePtr& value) {
  const std::string& part = path.parts[at];
  if (part == "0" && old.kind == Node::Kind::kMapping && !old.entries.empty() && old.find(part) == nullptr) {
    return replaced(std::make_shared<Node>(old), path, at + 1, value);  // a mapping that stands for a list of one
  }
  if (old.kind != Node::Kind::kMapping && !old.is_null()) {
    user_error("command line: '{}': expected a mapping before '{}', found {}", path.assignment, part, describe(old));
  }
  auto node = std::make_shared<Node>(old);
  node->kind = Node::Kind::kMapping;
  for (Entry& entry : node->entries) {
    if (entry.key != part) continue;
    entry.value = replaced(entry.value, path, at + 1, value);
    if (at + 1 == path.parts.size()) entry.line = 0;
    return node;
  }
  node->entries.push_back({part, 0, replaced(nullptr, path, at + 1, value)});
  return node;
}

NodePtr replaced(const NodePtr& old, const Path& path, size_t at, const NodePtr& value) {
  if (at == path.parts.size()) return value;
  const Node missing;
  const Node& node = old == nullptr ? missing : *old;
  const bool new_list = node.is_null() && path.parts[at] == "0";
  if (node.kind == Node::Kind::kList || new_list) {
    Node list = node;
    list.kind = Node::Kind::kList;
    return replaced_in_list(list, path, at, value);
  }
  return replaced_in_mapping(node, path, at, value);
}

}  // namespace

NodePtr with_override(const NodePtr& root, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  const std::string key = assignment.substr(0, equals);
  Path path{assignment, parts_of(key)};
  if (std::any_of(path.parts.begin(), path.parts.end(), names_a_secret)) path.assignment = key + "=hidden";
  const bool named = std::none_of(path.parts.begin(), path.parts.end(), [](const std::string& part) { return part.empty(); });
  ULY_USER_CHECK(equals != std::string::npos && named, "command line: expected key.path=value, found '{}'", path.assignment);
  const NodePtr value = read_yaml(assignment.substr(equals + 1), fmt::format("command line: '{}'", path.assignment), false);
  return replaced(root, path, 0, value);
}

}  // namespace uly::recipe
