
# A host with VMX: the command's files are in this root file system, and the ports are serial.
# Runs /job/command, and reports "exit STATUS".
for port in "$out" "$err" "$control"; do
    stty -F "$port" raw -echo 115200
done
mkdir -p /tmp /run /var/tmp
chmod 1777 /tmp /var/tmp
run /bin/sh /job/command
# Settings change when all is written.
drain() {
    stty -F "$1" raw -echo 115200
}
drain "$out"
drain "$err"
echo "exit $status" >&3
drain "$control"
exec poweroff -f
