// Evaluates Go templates as Ollama does: reads cases from stdin, writes what each renders.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type testCase struct {
	Template string
	System   string
	Messages []*message
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

// joined puts a role's messages in a row into one, and gives all the system messages as well.
func joined(messages []*message) (string, []*message) {
	var systems []string
	var turns []*message
	for _, m := range messages {
		if m.Role == "system" {
			systems = append(systems, m.Content)
		}
		if n := len(turns); n > 0 && turns[n-1].Role == m.Role {
			turns[n-1].Content += "\n\n" + m.Content
			continue
		}
		turns = append(turns, &message{m.Role, m.Content})
	}
	return strings.Join(systems, "\n\n"), turns
}

func render(c testCase) answer {
	asJSON := func(v any) string {
		text, _ := json.Marshal(v)
		return string(text)
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": asJSON}).Parse(c.Template)
	if err != nil {
		return answer{Error: "parse: " + err.Error()}
	}
	messages := c.Messages
	if c.System != "" && len(messages) > 0 && messages[0].Role != "system" {
		messages = append([]*message{{"system", c.System}}, messages...)
	}
	system, turns := joined(messages)
	var out strings.Builder
	values := map[string]any{"System": system, "Messages": turns, "Tools": nil, "Response": ""}
	if err := parsed.Execute(&out, values); err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Text: out.String()}
}

func main() {
	var cases []testCase
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	answers := []answer{}
	for _, c := range cases {
		answers = append(answers, render(c))
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		panic(err)
	}
}
