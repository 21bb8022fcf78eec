-- The ledger: usage records (the journal of requests) and credit transactions. What was written stays
-- written.
--
-- Credits change in two ways only: by the cost of a request, in usage_records, and by a row of
-- credit_transactions.

-- Usage records
-- -------------

-- Two triggers on this table belong to other subjects: usage_records_expiry_moved (14_holds.sql) and
-- usage_records_amended (16_usage_sums.sql).
create table public.usage_records (
    request_id uuid primary key,
    client_request_id varchar(256),
    user_id bigint not null references public.users (id),
    key_id bigint not null references public.api_keys_new (id),
    mode text not null,
    environment text not null,
    endpoint text not null,
    model text not null,
    model_used text,
    provider text,
    prompt_estimate bigint not null default 0,
    output_granted bigint not null default 0,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    hold_nanos bigint not null,
    upstream_cost_nanos bigint,
    cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    markup numeric not null,
    status text not null default 'pending',
    settlement_source text,
    finish_reason text,
    error_code text,
    streamed boolean not null default false,
    latency_ms bigint,
    time_to_first_token_ms bigint,
    generation_id varchar(256),
    created_at timestamptz not null,
    expires_at timestamptz not null,
    settled_at timestamptz,
    end_user varchar(256),
    byok boolean not null default false,
    cache_hit boolean not null default false,
    price_basis jsonb,
    balance_after_nanos bigint,
    has_idempotency_key boolean not null default false,
    has_end_user_budget boolean not null default false
) with (fillfactor = 40);

-- What holds of every record. One function, because PostgreSQL reads the text of a table's checks anew for
-- every statement: as a dozen checks these rules took a quarter of the time of admission and settlement.
create function public.is_sound_record(r public.usage_records) returns boolean
language plpgsql immutable as $$
begin
    return least(r.prompt_estimate, r.output_granted, r.hold_nanos, r.upstream_cost_nanos, r.cost_nanos,
                 r.overrun_nanos) >= 0
        and r.markup > 0
        and r.mode in ('sandbox', 'live')
        and r.environment in ('live', 'test', 'staging', 'development')
        and case r.status
            when 'pending' then r.settled_at is null and r.settlement_source is null and r.cost_nanos = 0
            else r.status in ('completed', 'failed', 'cancelled', 'expired') and r.settled_at is not null
                 and coalesce(r.settlement_source in ('usage', 'generation', 'none'), false)
        end;
end $$;
revoke all on function public.is_sound_record(public.usage_records) from public, anon, authenticated;
grant execute on function public.is_sound_record(public.usage_records) to service_role;
alter table public.usage_records add constraint usage_records_sound
    check (public.is_sound_record(usage_records));

comment on constraint usage_records_sound on public.usage_records is
    'No negative amount; pending without an end and a cost, settled with both.';
comment on table public.usage_records is
    'One row per admitted request: pending with its hold, then finished by settlement. No index may mention '
    'what settlement changes, or updates stop being heap-only; a settled row is longer, and 40 leaves room '
    'for a page whose rows are settled in one transaction.';
comment on column public.usage_records.price_basis is
    'What the hold was made of, nano-dollars as text, without markup: fixed_nanos, output_nanos (one output '
    'token), max_price as sent.';
comment on column public.usage_records.balance_after_nanos is
    'The account''s credits right after this request was settled.';
comment on column public.usage_records.byok is
    'Sent with the user''s own upstream key: metered and limited, not charged.';
comment on column public.usage_records.has_idempotency_key is
    'A row of stored_answers waits for how this request ends.';
comment on column public.usage_records.has_end_user_budget is
    'Its hold counts in end_user_usage, and so does its cost.';
create index usage_records_user_idx on public.usage_records (user_id, created_at desc);
create index usage_records_key_idx on public.usage_records (key_id, created_at);
create index usage_records_expiry_idx on public.usage_records
    using brin (expires_at) with (pages_per_range = 16);
comment on index public.usage_records_expiry_idx is
    'The sweep''s way to expired holds; records arrive in this order.';
create index usage_records_created_idx on public.usage_records
    using brin (created_at) with (pages_per_range = 16);
create index usage_records_byok_idx on public.usage_records (key_id, created_at) where byok;
comment on index public.usage_records_byok_idx is
    'What was sent with users'' own keys is summed up nowhere else. It mentions only what admission writes '
    'once, so updates stay heap-only.';
alter table public.usage_records enable row level security;
revoke all on public.usage_records from public, anon, authenticated, service_role;
grant select, insert, update on public.usage_records to service_role;

-- Credit transactions
-- -------------------

create table public.credit_transactions (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    kind text not null check (kind in ('grant', 'purchase', 'refund', 'adjustment', 'expiry')),
    amount_nanos bigint not null check (amount_nanos <> 0),
    balance_after_nanos bigint not null check (balance_after_nanos >= 0),
    payment_method text check (payment_method in ('mastercard', 'paca_token')),
    request_id uuid references public.usage_records (request_id),
    idempotency_key text check (length(idempotency_key) between 1 and 255),
    actor text not null,
    reason text not null default '' check (length(reason) <= 500),
    created_at timestamptz not null default clock_timestamp(),
    constraint credit_transactions_sign check (
        case kind when 'grant' then amount_nanos > 0 when 'purchase' then amount_nanos > 0
                  when 'refund' then amount_nanos > 0 when 'expiry' then amount_nanos < 0 else true end
    ),
    constraint credit_transactions_refund_names_request check ((kind = 'refund') = (request_id is not null))
);
comment on table public.credit_transactions is 'Every change of credits that is not the charge of a request.';
create unique index credit_transactions_idempotency_key on public.credit_transactions (idempotency_key);
comment on index public.credit_transactions_idempotency_key is 'The same order twice is one transaction.';
create index credit_transactions_user_idx on public.credit_transactions (user_id, id desc);
create index credit_transactions_request_idx on public.credit_transactions (request_id)
    where request_id is not null;
alter table public.credit_transactions enable row level security;
revoke all on public.credit_transactions from public, anon, authenticated, service_role;
grant select, insert on public.credit_transactions to service_role;
revoke all on sequence public.credit_transactions_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.credit_transactions_id_seq to service_role;

-- Nothing is changed or deleted
-- -----------------------------

-- For tables that only grow. Grants forbid most of this already; the trigger binds the owner as well.
create function public.refuse_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception '% is append-only: % is refused', tg_table_name, lower(tg_op)
        using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_change() from public, anon, authenticated;
grant execute on function public.refuse_change() to service_role;

create trigger credit_transactions_append_only before update or delete on public.credit_transactions
    for each row execute function public.refuse_change();

create trigger credit_transactions_no_truncate before truncate on public.credit_transactions
    for each statement execute function public.refuse_change();

create trigger usage_records_never_deleted before delete on public.usage_records
    for each row execute function public.refuse_change();

create trigger usage_records_no_truncate before truncate on public.usage_records
    for each statement execute function public.refuse_change();

-- A settled record is frozen. Only one that was settled without a known cost may be amended, once, by what
-- the upstream says.
create function public.refuse_thaw() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.settlement_source = 'none' and new.settlement_source in ('usage', 'generation')
       and (new.request_id, new.user_id, new.key_id, new.hold_nanos, new.markup, new.created_at)
           is not distinct from
           (old.request_id, old.user_id, old.key_id, old.hold_nanos, old.markup, old.created_at) then
        return new;
    end if;
    raise exception 'usage record % is settled and frozen', old.request_id
        using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_thaw() from public, anon, authenticated;
grant execute on function public.refuse_thaw() to service_role;

create trigger usage_records_frozen before update on public.usage_records
    for each row when (old.status <> 'pending') execute function public.refuse_thaw();

-- A hold may be raised while its request runs; nothing else of a record's identity ever changes.
create function public.refuse_identity_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception 'usage record %: who, when and how much was held never changes', old.request_id
        using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_identity_change() from public, anon, authenticated;
grant execute on function public.refuse_identity_change() to service_role;

create trigger usage_records_identity
    before update of request_id, user_id, key_id, mode, environment, markup, created_at
    on public.usage_records for each row execute function public.refuse_identity_change();

create trigger usage_records_hold before update of hold_nanos on public.usage_records
    for each row when (old.status <> 'pending' or new.status <> 'pending' or new.hold_nanos < old.hold_nanos)
    execute function public.refuse_identity_change();

-- Changing credits
-- ----------------

-- Changes the credits of a user whose row is locked, and writes the transaction that explains it. A repeated
-- idempotency key returns the first transaction.
create function public.change_credits(
    p_user_id bigint, p_kind text, p_amount_nanos bigint, p_actor text, p_reason text, p_idempotency_key text,
    p_payment_method text
) returns public.credit_transactions language plpgsql set search_path = '' as $$
declare
    v_entry public.credit_transactions;
    v_balance bigint;
begin
    select * into v_entry from public.credit_transactions where idempotency_key = p_idempotency_key;
    if found then
        return v_entry;
    end if;
    update public.users set credits_nanos = credits_nanos + p_amount_nanos, updated_at = clock_timestamp()
    where id = p_user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (
        user_id, kind, amount_nanos, balance_after_nanos, actor, reason, idempotency_key, payment_method)
    values (p_user_id, p_kind, p_amount_nanos, v_balance, p_actor, p_reason, p_idempotency_key,
            p_payment_method)
    returning * into v_entry;
    return v_entry;
end $$;
revoke all on function public.change_credits(bigint, text, bigint, text, text, text, text)
    from public, anon, authenticated;
grant execute on function public.change_credits(bigint, text, bigint, text, text, text, text) to service_role;

-- p: user_id or hashes, amount_nanos, reason, idempotency_key.
-- Outcomes: granted, repeated, conflict (the idempotency key belongs to another transaction), not_found,
-- too_large.
create function public.grant_credits(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_amount bigint := (p ->> 'amount_nanos')::bigint;
    v_entry public.credit_transactions;
    v_before bigint := (select coalesce(max(t.id), 0) from public.credit_transactions t);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif v_user.credits_nanos > 9000000000000000000 - v_amount then
        return jsonb_build_object('outcome', 'too_large');
    end if;
    begin
        v_entry := public.change_credits(
            v_user.id, 'grant', v_amount, p ->> 'actor', coalesce(p ->> 'reason', ''),
            p ->> 'idempotency_key', null);
    exception when unique_violation then -- the same key, at the same time, for another user
        return jsonb_build_object('outcome', 'conflict');
    end;
    if (v_entry.user_id, v_entry.kind, v_entry.amount_nanos)
        is distinct from (v_user.id, 'grant'::text, v_amount) then
        return jsonb_build_object('outcome', 'conflict');
    end if;
    if v_entry.id <= v_before then
        return jsonb_build_object('outcome', 'repeated', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                                  'balance_nanos', v_user.credits_nanos);
    end if;
    perform public.activate_subscription(v_user.id, true);
    perform public.write_audit(
        p ->> 'actor', 'add_credits', 'user:' || v_user.id, v_user.id, null, p ->> 'address',
        p ->> 'user_agent', (p ->> 'request_id')::uuid,
        jsonb_build_object('amount_nanos', v_amount, 'transaction_id', v_entry.id));
    return jsonb_build_object('outcome', 'granted', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                              'balance_nanos', v_entry.balance_after_nanos);
end $$;
revoke all on function public.grant_credits(jsonb) from public, anon, authenticated;
grant execute on function public.grant_credits(jsonb) to service_role;

-- p: user_id or hashes, amount_nanos (signed), reason, idempotency_key. What is held cannot be taken.
-- Outcomes: adjusted, repeated, conflict, not_found, too_much, too_large.
create function public.adjust_credits(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_amount bigint := (p ->> 'amount_nanos')::bigint;
    v_known public.credit_transactions;
    v_entry public.credit_transactions;
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_known from public.credit_transactions where idempotency_key = p ->> 'idempotency_key';
    if found then
        return jsonb_build_object(
            'outcome', case when (v_known.user_id, v_known.kind, v_known.amount_nanos)
                                 = (v_user.id, 'adjustment', v_amount)
                            then 'repeated' else 'conflict' end,
            'transaction_id', v_known.id, 'user_id', v_user.id, 'balance_nanos', v_user.credits_nanos);
    elsif v_user.credits_nanos - v_user.held_nanos + v_amount < 0 then
        return jsonb_build_object(
            'outcome', 'too_much', 'available_nanos', v_user.credits_nanos - v_user.held_nanos);
    elsif v_user.credits_nanos > 9000000000000000000 - v_amount then
        return jsonb_build_object('outcome', 'too_large');
    end if;
    v_entry := public.change_credits(
        v_user.id, 'adjustment', v_amount, p ->> 'actor', coalesce(p ->> 'reason', ''),
        p ->> 'idempotency_key', null);
    perform public.write_audit(
        p ->> 'actor', 'adjust_credits', 'user:' || v_user.id, v_user.id, null, p ->> 'address',
        p ->> 'user_agent', (p ->> 'request_id')::uuid,
        jsonb_build_object('amount_nanos', v_amount, 'transaction_id', v_entry.id));
    return jsonb_build_object('outcome', 'adjusted', 'transaction_id', v_entry.id, 'user_id', v_user.id,
                              'balance_nanos', v_entry.balance_after_nanos);
end $$;
revoke all on function public.adjust_credits(jsonb) from public, anon, authenticated;
grant execute on function public.adjust_credits(jsonb) to service_role;

-- p: refunded_request_id, amount_nanos (null: all that is left), reason, idempotency_key. All refunds of a
-- request together are at most its cost.
-- Outcomes: refunded, repeated, conflict, not_found, not_settled, too_much.
create function public.refund_request(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_record public.usage_records;
    v_refunded bigint;
    v_amount bigint;
    v_balance bigint;
    v_entry public.credit_transactions;
begin
    select * into v_record from public.usage_records where request_id = (p ->> 'refunded_request_id')::uuid;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform from public.users where id = v_record.user_id for no key update;
    -- Read again under the lock: the request may have been settled meanwhile.
    select * into v_record from public.usage_records where request_id = v_record.request_id;
    select * into v_entry from public.credit_transactions where idempotency_key = p ->> 'idempotency_key';
    if found then
        return jsonb_build_object(
            'outcome', case when v_entry.request_id = v_record.request_id
                                 and v_entry.amount_nanos
                                     = coalesce((p ->> 'amount_nanos')::bigint, v_entry.amount_nanos)
                            then 'repeated' else 'conflict' end,
            'transaction_id', v_entry.id, 'user_id', v_entry.user_id, 'amount_nanos', v_entry.amount_nanos,
            'balance_nanos', (select credits_nanos from public.users where id = v_entry.user_id));
    elsif v_record.status = 'pending' then
        return jsonb_build_object('outcome', 'not_settled');
    elsif not exists (select from public.gateway_state s where s.mode = v_record.mode) then
        -- Play money is never given back as real money.
        return jsonb_build_object('outcome', 'too_much', 'refundable_nanos', 0);
    end if;
    select coalesce(sum(amount_nanos), 0) into v_refunded from public.credit_transactions
    where request_id = v_record.request_id;
    v_amount := coalesce((p ->> 'amount_nanos')::bigint, v_record.cost_nanos - v_refunded);
    if v_amount <= 0 or v_amount > v_record.cost_nanos - v_refunded then
        return jsonb_build_object(
            'outcome', 'too_much', 'refundable_nanos', v_record.cost_nanos - v_refunded);
    end if;
    update public.users set credits_nanos = credits_nanos + v_amount where id = v_record.user_id
    returning credits_nanos into v_balance;
    insert into public.credit_transactions (
        user_id, kind, amount_nanos, balance_after_nanos, request_id, actor, reason, idempotency_key)
    values (v_record.user_id, 'refund', v_amount, v_balance, v_record.request_id, p ->> 'actor',
            coalesce(p ->> 'reason', ''), p ->> 'idempotency_key')
    returning * into v_entry;
    perform public.write_audit(
        p ->> 'actor', 'refund', 'request:' || v_record.request_id, v_record.user_id, v_record.key_id,
        p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid,
        jsonb_build_object('amount_nanos', v_amount));
    return jsonb_build_object(
        'outcome', 'refunded', 'transaction_id', v_entry.id, 'user_id', v_record.user_id,
        'amount_nanos', v_amount, 'balance_nanos', v_balance);
end $$;
revoke all on function public.refund_request(jsonb) from public, anon, authenticated;
grant execute on function public.refund_request(jsonb) to service_role;

-- Reading the ledger
-- ------------------

-- An account's balance and what it was given in all, at one moment. A refund is no gift: it gives back what
-- was charged.
create function public.read_credits(p_user_id bigint) returns jsonb
language sql stable set search_path = '' as $$
    select jsonb_build_object('balance_nanos', u.credits_nanos, 'granted_nanos', coalesce((
        select sum(t.amount_nanos) from public.credit_transactions t
        where t.user_id = u.id and t.kind <> 'refund'), 0))
    from public.users u where u.id = p_user_id
$$;
revoke all on function public.read_credits(bigint) from public, anon, authenticated;
grant execute on function public.read_credits(bigint) to service_role;

-- A request of this user with its refunds, or null.
create function public.read_receipt(p_user_id bigint, p_request_id uuid) returns jsonb
language sql stable set search_path = '' as $$
    -- The markup goes out as text: as a JSON number it would be read as a float.
    select to_jsonb(r) || jsonb_build_object('markup', r.markup::text, 'refunds', (
        select coalesce(jsonb_agg(
            jsonb_build_object('transaction_id', t.id, 'amount_nanos', t.amount_nanos, 'reason', t.reason,
                               'balance_after_nanos', t.balance_after_nanos, 'created_at', t.created_at)
            order by t.id), '[]')
        from public.credit_transactions t where t.request_id = r.request_id))
    from public.usage_records r where r.request_id = p_request_id and r.user_id = p_user_id
$$;
revoke all on function public.read_receipt(bigint, uuid) from public, anon, authenticated;
grant execute on function public.read_receipt(bigint, uuid) to service_role;

-- A user's newest request with this generation id, or null. No index may hold what settlement writes, so the
-- search runs over the user's requests around p_around (a minute either way, then a quarter of an hour) or,
-- where the id names no time, of the last day: at most 50,000 requests each time.
create function public.find_generation(
    p_user_id bigint, p_generation_id text, p_around timestamptz
) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_width interval;
    v_found jsonb;
begin
    foreach v_width in array case when p_around is null then array[interval '1 day']
                                  else array[interval '1 minute', interval '15 minutes'] end
    loop
        select to_jsonb(r) into v_found from (
            select * from public.usage_records n
            where n.user_id = p_user_id and n.created_at >= coalesce(p_around, clock_timestamp()) - v_width
              and n.created_at <= coalesce(p_around, clock_timestamp()) + v_width
            order by n.created_at desc limit 50000) as r
        where r.generation_id = p_generation_id order by r.created_at desc limit 1;
        exit when v_found is not null;
    end loop;
    return v_found;
end $$;
revoke all on function public.find_generation(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.find_generation(bigint, text, timestamptz) to service_role;

-- Proof
-- -----

-- Promise 2 as a query: every account whose books do not add up. It never returns a row.
create function public.audit_ledger()
returns table (user_id bigint, credits_nanos bigint, ledger_nanos numeric, held_nanos bigint,
               pending_nanos numeric)
language sql stable set search_path = '' as $$
    select u.id, u.credits_nanos, coalesce(t.total, 0) - coalesce(r.charged, 0), u.held_nanos,
           coalesce(r.pending, 0)
    from public.users u
    left join (select t.user_id, sum(t.amount_nanos) as total
               from public.credit_transactions t group by 1) t on t.user_id = u.id
    left join (select r.user_id, sum(r.cost_nanos) as charged,
                      sum(r.hold_nanos) filter (where r.status = 'pending') as pending
               from public.usage_records r group by 1) r on r.user_id = u.id
    where u.credits_nanos <> coalesce(t.total, 0) - coalesce(r.charged, 0)
      or u.held_nanos <> coalesce(r.pending, 0)
$$;
revoke all on function public.audit_ledger() from public, anon, authenticated;
grant execute on function public.audit_ledger() to service_role;
