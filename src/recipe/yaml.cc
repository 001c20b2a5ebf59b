#include "recipe/yaml.h"

#include <yaml.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "recipe/scalar.h"

namespace uly::recipe {
namespace {

constexpr int kMaxDepth = 64;
constexpr int64_t kMaxWeight = 100'000;

// Owns what libyaml hands out for one event.
class Event {
 public:
  Event() = default;
  ~Event() { yaml_event_delete(&event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  yaml_event_t* operator->() { return &event_; }
  yaml_event_t* get() { return &event_; }

 private:
  yaml_event_t event_{};
};

std::string text_of(const yaml_char_t* chars) { return chars == nullptr ? "" : reinterpret_cast<const char*>(chars); }

void put(std::vector<Entry>& entries, const Entry& entry) {
  for (Entry& old : entries) {
    if (old.key == entry.key) {
      old = entry;
      return;
    }
  }
  entries.push_back(entry);
}

class Reader {
 public:
  Reader(const std::string& text, const std::string& name, bool in_file) : text_(text), name_(name), in_file_(in_file) {
    ULY_CHECK(yaml_parser_initialize(&parser_) != 0, "libyaml: no memory");
    yaml_parser_set_input_string(&parser_, reinterpret_cast<const unsigned char*>(text_.data()), text_.size());
  }
  ~Reader() { yaml_parser_delete(&parser_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  NodePtr read() {
    expect(YAML_STREAM_START_EVENT);
    {
      Event event;
      next(event);
      if (event->type == YAML_STREAM_END_EVENT) return std::make_shared<Node>();
    }
    NodePtr root;
    {
      Event event;
      next(event);
      root = read_node(event, 0);
    }
    expect(YAML_DOCUMENT_END_EVENT);
    Event event;
    next(event);
    if (event->type != YAML_STREAM_END_EVENT) fail(line_of(event), "expected one document, found a second one");
    return root;
  }

 private:
  [[noreturn]] void fail(int line, const std::string& message) const {
    throw UserError(in_file_ ? fmt::format("{}:{}: {}", name_, line, message) : fmt::format("{}: {}", name_, message));
  }

  int line_of(Event& event) const { return in_file_ ? static_cast<int>(event->start_mark.line) + 1 : 0; }

  void next(Event& event) {
    if (yaml_parser_parse(&parser_, event.get()) != 0) return;
    size_t line = parser_.problem_mark.line;
    if (parser_.error == YAML_READER_ERROR) {
      const size_t end = std::min(parser_.problem_offset, text_.size());
      line = static_cast<size_t>(std::count(text_.begin(), text_.begin() + static_cast<std::ptrdiff_t>(end), '\n'));
    }
    std::string problem = parser_.problem == nullptr ? "no memory" : parser_.problem;
    if (tab_indents(line)) problem = "a tab indents this line; YAML takes spaces";
    fail(static_cast<int>(line) + 1, "not valid YAML: " + problem);
  }

  bool tab_indents(size_t line) const {
    size_t start = 0;
    for (; line > 0 && start != std::string::npos; --line) {
      start = text_.find('\n', start);
      if (start != std::string::npos) ++start;
    }
    if (start == std::string::npos) return false;
    const size_t first = text_.find_first_not_of(' ', start);
    return first != std::string::npos && text_[first] == '\t';
  }

  void expect(yaml_event_type_t type) {
    Event event;
    next(event);
    ULY_CHECK(event->type == type, "libyaml: unexpected event");
  }

  NodePtr read_node(Event& event, int depth) {
    if (depth > kMaxDepth) fail(line_of(event), fmt::format("nested deeper than {} levels", kMaxDepth));
    switch (event->type) {
      case YAML_ALIAS_EVENT:
        return alias(event);
      case YAML_SCALAR_EVENT:
        return remember(text_of(event->data.scalar.anchor), scalar(event));
      case YAML_SEQUENCE_START_EVENT:
        return list(event, depth);
      case YAML_MAPPING_START_EVENT:
        return mapping(event, depth);
      default:
        ULY_CHECK(false, "libyaml: unexpected event");
    }
    return nullptr;
  }

  NodePtr remember(const std::string& anchor, const NodePtr& node) {
    if (!anchor.empty()) anchors_[anchor] = node;
    return node;
  }

  NodePtr alias(Event& event) {
    const std::string anchor = text_of(event->data.alias.anchor);
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) fail(line_of(event), fmt::format("alias '*{}' names no anchor above it", anchor));
    if (found->second == nullptr) fail(line_of(event), fmt::format("alias '*{}' stands inside its own anchor", anchor));
    return found->second;
  }

  NodePtr scalar(Event& event) {
    auto node = std::make_shared<Node>();
    node->line = line_of(event);
    node->text = std::string(reinterpret_cast<const char*>(event->data.scalar.value), event->data.scalar.length);
    if (node->text.find('\0') != std::string::npos) fail(node->line, "a text holds the character NUL, which no name or path can");
    node->scalar = node->text;
    if (event->data.scalar.plain_implicit != 0) {
      node->scalar = resolve_scalar(node->text);
    } else if (event->data.scalar.quoted_implicit == 0) {
      node->scalar = tagged(text_of(event->data.scalar.tag), node->text, node->line);
    }
    return node;
  }

  Json tagged(const std::string& tag, const std::string& text, int line) const {
    if (tag == "!" || tag == YAML_STR_TAG) return text;
    const Json value = resolve_scalar(text);
    const bool fits = (tag == YAML_NULL_TAG && value.is_null()) || (tag == YAML_BOOL_TAG && value.is_boolean()) ||
                      (tag == YAML_INT_TAG && value.is_number_integer()) || (tag == YAML_FLOAT_TAG && value.is_number());
    if (!fits) fail(line, fmt::format("tag '{}' does not fit '{}' or is not one of str, int, float, bool, null", tag, text));
    return tag == YAML_FLOAT_TAG ? Json(value.get<double>()) : value;
  }

  void check_tag(const yaml_char_t* tag, const char* plain, int line) const {
    const std::string text = text_of(tag);
    if (!text.empty() && text != "!" && text != plain) fail(line, fmt::format("tag '{}' is not plain YAML", text));
  }

  void add_weight(Node& node, const Node& child) const {
    node.weight += child.weight;
    if (node.weight > kMaxWeight) fail(node.line, "holds more than 100,000 values once its aliases are expanded");
  }

  NodePtr list(Event& start, int depth) {
    auto node = std::make_shared<Node>();
    node->kind = Node::Kind::kList;
    node->line = line_of(start);
    check_tag(start->data.sequence_start.tag, YAML_SEQ_TAG, node->line);
    const std::string anchor = text_of(start->data.sequence_start.anchor);
    remember(anchor, nullptr);
    while (true) {
      Event event;
      next(event);
      if (event->type == YAML_SEQUENCE_END_EVENT) return remember(anchor, node);
      node->items.push_back(read_node(event, depth + 1));
      add_weight(*node, *node->items.back());
    }
  }

  NodePtr mapping(Event& start, int depth) {
    auto node = std::make_shared<Node>();
    node->kind = Node::Kind::kMapping;
    node->line = line_of(start);
    check_tag(start->data.mapping_start.tag, YAML_MAP_TAG, node->line);
    const std::string anchor = text_of(start->data.mapping_start.anchor);
    remember(anchor, nullptr);
    std::vector<Entry> own;
    std::vector<Entry> merged;
    std::map<std::string, int> seen;
    while (true) {
      Event event;
      next(event);
      if (event->type == YAML_MAPPING_END_EVENT) break;
      const bool plain = event->type == YAML_SCALAR_EVENT && event->data.scalar.plain_implicit != 0;
      Entry entry = key(event, depth);
      if (const auto [old, is_new] = seen.emplace(entry.key, entry.line); !is_new) {
        fail(entry.line,
             in_file_ ? fmt::format("duplicate key '{}', first given in line {}", entry.key, old->second) : fmt::format("duplicate key '{}'", entry.key));
      }
      Event value;
      next(value);
      entry.value = read_node(value, depth + 1);
      add_weight(*node, *entry.value);
      if (plain && entry.key == "<<") {
        merge(merged, entry);
      } else {
        own.push_back(entry);
      }
    }
    for (const Entry& entry : own) merged.empty() ? node->entries.push_back(entry) : put(merged, entry);
    if (!merged.empty()) node->entries = std::move(merged);
    return remember(anchor, node);
  }

  Entry key(Event& event, int depth) {
    const int line = line_of(event);
    const NodePtr node = read_node(event, depth + 1);
    if (node->kind != Node::Kind::kScalar) fail(line, "expected text as a key, found " + describe(*node));
    return {node->text, line, nullptr};
  }

  // Adds the keys of a mapping, or of a list of mappings of which earlier ones win.
  void merge(std::vector<Entry>& merged, const Entry& entry) const {
    std::vector<NodePtr> sources = entry.value->kind == Node::Kind::kList ? entry.value->items : std::vector<NodePtr>{entry.value};
    std::reverse(sources.begin(), sources.end());
    for (const NodePtr& source : sources) {
      if (source->kind != Node::Kind::kMapping) fail(entry.line, "'<<' expects a mapping or a list of mappings, found " + describe(*source));
      for (const Entry& inherited : source->entries) put(merged, inherited);
    }
  }

  yaml_parser_t parser_{};
  const std::string& text_;
  const std::string& name_;
  const bool in_file_;
  std::map<std::string, NodePtr> anchors_;  // nullptr while the anchored node is being read
};

}  // namespace

const Entry* Node::find(const std::string& key) const {
  for (const Entry& entry : entries) {
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

NodePtr read_yaml(const std::string& text, const std::string& name, bool in_file) { return Reader(text, name, in_file).read(); }

Json to_json(const Node& node) {
  if (node.kind == Node::Kind::kScalar) return node.scalar;
  if (node.kind == Node::Kind::kList) {
    Json list = Json::array();
    for (const NodePtr& item : node.items) list.push_back(to_json(*item));
    return list;
  }
  Json mapping = Json::object();
  for (const Entry& entry : node.entries) mapping[entry.key] = to_json(*entry.value);
  return mapping;
}

std::string describe(const Node& node) {
  if (node.kind == Node::Kind::kList) return node.items.empty() ? "an empty list" : "a list";
  if (node.kind == Node::Kind::kMapping) return "a mapping";
  if (node.scalar.is_null()) return "nothing";
  if (!node.scalar.is_string()) return node.text;
  constexpr size_t kShown = 60;
  if (node.text.size() <= kShown) return "'" + node.text + "'";
  size_t end = kShown;
  while (end > 0 && (static_cast<unsigned char>(node.text[end]) & 0xC0) == 0x80) --end;
  return "'" + node.text.substr(0, end) + "...'";
}

}  // namespace uly::recipe
