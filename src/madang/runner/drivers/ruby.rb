# Cells of Ruby; the protocol: docs/reference/drivers.md.

module Madang
  NONCE, IN, OUT, ERR = ENV.delete("MADANG_NONCE"), IO.new(3, "rb"), $stdout.dup, $stderr.dup
  ENV.delete("DRIVER")
  [OUT, ERR].each(&:binmode)
  [$stdout, $stderr].each { |stream| stream.sync = true }
  BINDING = TOPLEVEL_BINDING

  class << self
    attr_accessor :cell, :running

    def frame(kind, id, what = "-", payload = "", to: OUT)
      payload = payload.dup.force_encoding("BINARY")
      to.write("\x1e#{NONCE} #{kind} #{id} #{what} #{payload.bytesize}\n".b + payload + "\n")
      to.flush
    end

    def take
      head = IN.gets or exit!(0)
      op, id, size = head.split(" ")
      [op, id, IN.read(size.to_i).force_encoding("UTF-8")]
    end

    # nil: nobody answers.
    def ask(prompt = "", secret: false)
      frame("input", cell, secret ? "password" : "prompt", prompt)
      loop do
        op, id, text = take
        return text if op == "input" && id == cell
        return nil if op == "eof" && id == cell
        exit!(0) if op == "quit"
      end
    end

    def error(id, problem)
      if problem.is_a?(Interrupt)
        return frame("error", id, "-", "Interrupted\nThe cell was interrupted.")
      end
      places = problem.backtrace || []
      line = places.map { |place| place[/\Acell:(\d+)/, 1] }.compact.first
      line ||= problem.message[/\Acell:(\d+)/, 1]
      text = problem.message.sub(/\Acell:\d+: /, "")
      inner = places.take_while { |place| !place.include?("Madang") && !place.start_with?("-e:") }
      frame("error", id, line || "-", [problem.class.name, text.lines.first.to_s.chomp,
        "#{line ? "cell:#{line}: " : ""}#{problem.class}: #{text}", *inner.map { |place| "  #{place}" }].join("\n"))
    end

    def bundle(kind, id, value)
      parts = { "text/plain" => value.inspect }
      parts = { "text/html" => value.to_html.to_s }.merge(parts) if value.respond_to?(:to_html)
      parts.each_with_index do |(mime, data), at|
        frame(at + 1 < parts.size ? "part" : kind, id, mime, data)
      end
    end

    def run(id, code)
      self.cell = id
      frame("begin", id)
      wall, cpu = [Process::CLOCK_MONOTONIC, Process::CLOCK_PROCESS_CPUTIME_ID].map { |clock| Process.clock_gettime(clock) }
      status = "ok"
      begin
        self.running = true
        value = BINDING.eval(code, "cell", 1)
        self.running = false
        bundle("result", id, value) unless value.nil? || code.rstrip.end_with?(";")
      rescue SystemExit
        raise
      rescue Exception => problem # also SyntaxError, Interrupt
        self.running = false
        status = "error"
        error(id, problem)
      end
      [$stdout, $stderr].each(&:flush)
      frame("fence", id, to: ERR)
      memory = File.read("/proc/self/statm").split[1].to_i * 4096
      frame("done", id, status, "wall_us=#{((Process.clock_gettime(Process::CLOCK_MONOTONIC) - wall) * 1e6).round}\n" \
        "cpu_us=#{((Process.clock_gettime(Process::CLOCK_PROCESS_CPUTIME_ID) - cpu) * 1e6).round}\nmem_bytes=#{memory}")
    end

    def cut(payload)
      cursor, code = payload.split("\n", 2)
      [cursor.to_i, code.to_s]
    end

    def complete(id, payload)
      cursor, code = cut(payload)
      before = code[0, cursor]
      names, word =
        if (found = before.match(/([A-Za-z_@$][\w.:@$]*)\.(\w*)\z/))
          [(BINDING.eval(found[1]).public_methods rescue []), found[2]]
        else
          word = before[/[A-Za-z_@$]\w*\z/].to_s
          [BINDING.local_variables + global_variables + Object.constants + BINDING.receiver.methods +
            Kernel.private_instance_methods, word]
        end
      found = names.map(&:to_s).select { |name| name.start_with?(word) && name != "Madang" }.uniq.sort.first(500)
      frame("completions", id, "#{cursor - word.size},#{cursor}", found.join("\n"))
    end

    def inspect_at(id, payload)
      cursor, code = cut(payload)
      word = code[0, cursor][/[\w.:@$]*\z/].to_s + code[cursor..].to_s[/\A[\w?!]*/].to_s
      return frame("inspection", id, "none") unless word.match?(/\A[A-Za-z_@$][\w.:@$]*[?!]?\z/)
      value = BINDING.eval(word)
      frame("inspection", id, "found", "#{value.class} #{word}\n#{value.inspect}")
    rescue StandardError, SyntaxError
      frame("inspection", id, "none")
    end

    def serve
      trap("INT") { raise Interrupt if running }
      frame("ready", "-", "-", RUBY_VERSION)
      loop do
        op, id, payload = take
        case op
        when "run" then run(id, payload)
        when "complete" then complete(id, payload)
        when "inspect" then inspect_at(id, payload)
        when "quit" then exit!(0)
        end
      end
    end
  end

  # What is read from standard input is asked for.
  class Input
    def gets(*)
      line = Madang.ask
      line && "#{line}\n"
    end

    def readline(*) = gets || raise(EOFError, "end of file reached")
    def getpass(prompt = "") = Madang.ask(prompt.to_s, secret: true)
    def noecho(&block) = block.call(self)
    def each_line(&block) = (block.call(line) while (line = gets))
    def readlines(*) = [].tap { |lines| each_line { |line| lines << line } }
    def read(*) = readlines.join
    def tty? = false
    def fileno = 0
  end
  $stdin = Input.new
end

def gets(*) = $stdin.gets
def readline(*) = $stdin.readline
def readlines(*) = $stdin.readlines
private :gets, :readline, :readlines

Madang.serve
