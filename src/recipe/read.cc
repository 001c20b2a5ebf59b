#include "recipe/read.h"

#include <algorithm>
#include <set>

#include "base/check.h"
#include "recipe/convert.h"

namespace uly::recipe {
namespace {

std::string join(const std::string& path, const std::string& name) { return path.empty() ? name : path + "." + name; }

class Walk {
 public:
  Walk(const Section& rows, Recipe& recipe) : rows_(rows), recipe_(recipe) {}

  Json section(const Section& section, const Node& node, const std::string& path, int line) {
    if (section.begin) section.begin(recipe_);
    Json whole = Json::object();
    for (const Field& field : section.fields) whole[field.name] = nullptr;
    std::set<std::string> given;
    for (const Entry& entry : in_order(section, node)) {
      const Field* field = field_of(section, entry.key);
      if (field == nullptr) {
        unknown(section, entry, path);
        whole[entry.key] = to_json(*entry.value);
        continue;
      }
      given.insert(field->name);
      whole[field->name] = value(*field, entry, join(path, field->name));
    }
    for (const Field& field : section.fields) {
      if (!given.contains(field.name)) whole[field.name] = absent(field, join(path, field.name), line);
    }
    return whole;
  }

 private:
  std::string where(int line) const { return line == 0 ? "command line" : fmt::format("{}:{}", recipe_.path, line); }

  static const Field* field_of(const Section& section, const std::string& key) {
    for (const Field& field : section.fields) {
      if (key == field.name || (!field.alias.empty() && key == field.alias)) return &field;
    }
    return nullptr;
  }

  // Returns the entries as written. Where a key and its alias are both given, the command line's holds.
  std::vector<Entry> in_order(const Section& section, const Node& node) const {
    std::vector<Entry> out;
    for (const Entry& entry : node.entries) {
      const Field* field = field_of(section, entry.key);
      const auto old = std::find_if(out.begin(), out.end(), [&](const Entry& o) { return field != nullptr && field_of(section, o.key) == field; });
      if (old == out.end()) {
        out.push_back(entry);
      } else if (entry.line == 0) {
        *old = entry;
      } else if (old->line != 0) {
        user_error("{}: '{}' and '{}' are the same key; keep one", where(entry.line), old->key, entry.key);
      }
    }
    return out;
  }

  void unknown(const Section& section, const Entry& entry, const std::string& path) {
    std::vector<std::string> names;
    for (const Field& field : section.fields) names.push_back(field.name);
    std::string meant = nearest(entry.key, names);
    if (!meant.empty()) {
      meant = join(path, meant);
    } else if (!section.open) {
      meant = elsewhere(entry.key);
    }
    const std::string key = join(path, entry.key);
    if (meant.empty() && section.open) {
      recipe_.locations[key] = where(entry.line);
      return note(recipe_.notes, entry.line, key, "no effect: " + section.open_why);
    }
    const std::string hint = meant.empty() ? "; docs/recipe.md lists the keys" : fmt::format("; did you mean '{}'?", meant);
    user_error("{}: unknown key '{}'{}", where(entry.line), key, hint);
  }

  // Returns where a key of this name belongs, if that is one place only.
  std::string elsewhere(const std::string& key) const {
    std::vector<std::string> found;
    if (field_of(rows_, key) != nullptr) found.push_back(field_of(rows_, key)->name);
    for (const Field& part : rows_.fields) {
      if (part.section.empty()) continue;
      const Field* field = field_of(part.section[0], key);
      if (field != nullptr && field->decision != Decision::kRefused) found.push_back(part.name + "." + field->name);
    }
    return found.size() == 1 ? found[0] : "";
  }

  void note(std::vector<Recipe::Note>& list, int line, const std::string& key, const std::string& text) { list.push_back({where(line), key, text}); }

  [[noreturn]] void mismatch(const Field& field, const Node& node, int line, const std::string& key) const {
    user_error("{}: {}: expected {}, found {}", where(line), key, expectation(field), describe(node));
  }

  Json value(const Field& field, const Entry& entry, const std::string& key) {
    recipe_.locations[key] = where(entry.line);
    const Node& node = *entry.value;
    if (field.kind == Kind::kSection) {
      if (node.kind != Node::Kind::kMapping && !node.is_null()) mismatch(field, node, entry.line, key);
      return section(field.section[0], node, key, entry.line);
    }
    if (field.kind == Kind::kSections) {
      Json list = sections(field, node, entry.line, key);
      if (!list.empty()) decide(field, list, entry.line, key, nullptr);
      return list;
    }
    const auto read = convert(field, node);
    if (!read) mismatch(field, node, entry.line, key);
    const Choice* written = choice_of(field, node.scalar);
    decide(field, *read, entry.line, key, written != nullptr ? written : choice_of(field, *read));
    if (field.set) field.set(recipe_, *read);
    return *read;
  }

  Json sections(const Field& field, const Node& node, int line, const std::string& key) {
    const bool one = node.kind != Node::Kind::kList && !node.is_null();
    const std::vector<NodePtr> items = one ? std::vector<NodePtr>{std::make_shared<Node>(node)} : node.items;
    if (static_cast<double>(items.size()) < field.min) user_error("{}: {}: expected at least one entry, found {}", where(line), key, describe(node));
    Json list = Json::array();
    for (const NodePtr& item : items) {
      const std::string path = join(key, std::to_string(list.size()));
      const int item_line = item->line == 0 ? line : item->line;
      recipe_.locations[path] = where(item_line);
      list.push_back(section(field.section[0], *as_mapping(field, item, item_line, path), path, item_line));
    }
    return list;
  }

  // A bare string stands for a mapping with one key; before a ':' it may name a type instead.
  NodePtr as_mapping(const Field& field, const NodePtr& item, int line, const std::string& path) const {
    if (item->kind == Node::Kind::kMapping) return item;
    const Section& section = field.section[0];
    if (section.bare.empty() || item->kind != Node::Kind::kScalar || !item->scalar.is_string()) {
      user_error("{}: {}: expected a mapping{}, found {}", where(line), path, section.bare.empty() ? "" : " or a name", describe(*item));
    }
    auto mapping = std::make_shared<Node>();
    mapping->kind = Node::Kind::kMapping;
    mapping->line = item->line;
    const Field* type = field_of(section, "type");
    const std::string head = item->text.substr(0, item->text.find(':'));
    const bool names_type = type != nullptr && choice_of(*type, head) != nullptr;
    auto value = std::make_shared<Node>(*item);
    if (names_type) value->scalar = value->text = head;
    mapping->entries.push_back({names_type ? "type" : section.bare, item->line, value});
    return mapping;
  }

  void decide(const Field& field, const Json& value, int line, const std::string& key, const Choice* choice) {
    const Decision decision = choice != nullptr ? choice->decision : field.decision;
    const std::string& why = choice != nullptr ? choice->why : field.why;
    if (decision == Decision::kWorks) return;
    if (decision == Decision::kNoEffect) {
      if (!value.is_null()) note(recipe_.notes, line, key, "no effect: " + why);
      return;
    }
    if (choice == nullptr && field.initial != kRequired && value == default_of(field)) return;
    if (decision == Decision::kLater) return note(recipe_.later, line, key, why);
    user_error("{}: {}: {}", where(line), key, why);
  }

  Json absent(const Field& field, const std::string& key, int line) {
    if (field.initial == kRequired) user_error("{}: {} is required: {}", line < 0 ? recipe_.path : where(line), key, field.doc);
    if (field.kind == Kind::kSection) return section(field.section[0], Node{.kind = Node::Kind::kMapping}, key, line);
    Json value = default_of(field);
    if (field.set) field.set(recipe_, value);
    return value;
  }

  const Section& rows_;
  Recipe& recipe_;
};

}  // namespace

Json read_recipe(const Section& rows, const Node& root, Recipe& recipe) { return Walk(rows, recipe).section(rows, root, "", -1); }

}  // namespace uly::recipe
